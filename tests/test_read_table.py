"""Tables as people write them: read as they are meant, or refused with the line, the value and what to do."""

import gzip
import io
import json
import pathlib
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from analysis import fit, laws, notation, read_table, table
from sae_jax import files
from sae_jax.errors import UserError

GAO = pathlib.Path(laws.__file__).parent / 'data' / 'gao2024_gpt4_L_n_k.csv'
ROWS = [(256, 4, 0.5), (512, 4, 0.45), (1024, 8, 0.4), (2048, 8, 0.36)]
PLAIN = 'n_latents,k,nmse\n' + ''.join(f'{n},{k},{y}\n' for n, k, y in ROWS)


@pytest.fixture
def read(tmp_path):
  def of(content, name='t.csv', **how):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return table.read_csv(str(tmp_path / name), **how)

  return of


def is_plain(rows):
  assert list(rows.columns) == ['n_latents', 'k', 'nmse']
  np.testing.assert_array_equal(table.positive(rows, rows.columns), np.array(ROWS))


@pytest.mark.parametrize(
  ('text', 'how'),
  {
    'plain': (PLAIN, {}),
    'a comma more in every row': (PLAIN.replace('\n', ',\n').replace('nmse,', 'nmse'), {}),
    'a comma more in every line': (PLAIN.replace('\n', ',\n'), {}),
    'empty columns and rows of a spreadsheet': (PLAIN.replace('\n', ',,,\n') + ',,,,,\n\n', {}),
    'comments': ('# by hand\n' + PLAIN.replace('512', '# half, of "it\n512') + '  # end', {}),
    'spaces': (PLAIN.replace(',', ' , '), {}),
    'quotes and line breaks of Windows': (
      '\r\n'.join(f'"{line}"'.replace(',', '", "') for line in PLAIN.split()),
      {},
    ),
    'a byte order mark': ('\ufeff' + PLAIN, {}),
    'thousands': (PLAIN.replace('1024', '"1,024"').replace('2048', '"2,048"'), {'thousands': ','}),
    'apostrophes': (PLAIN.replace('1024', "1'024").replace('2048', "2'048"), {'thousands': "'"}),
    'German': (
      PLAIN.replace(',', ';').replace('.', ',').replace('1024', '1.024').replace('2048', '2.048'),
      {'sep': ';', 'decimal': ',', 'thousands': '.'},
    ),
    'tabs': (PLAIN.replace(',', '\t'), {'sep': 'tab'}),
    'powers of ten': (PLAIN.replace('0.5', '5e-1').replace('256', '2.56E2'), {}),
    'UTF-16': (PLAIN.encode('utf-16'), {'encoding': 'utf-16'}),
    'gzip': (gzip.compress(PLAIN.encode(), mtime=0), {}),
    'JSON lines': (
      '\n'.join(json.dumps(dict(zip(('n_latents', 'k', 'nmse'), row, strict=True))) for row in ROWS),
      {},
    ),
  }.values(),
)
def test_read_takes_a_table_as_it_is_meant(read, text, how):
  is_plain(read(text, **how))


REFUSED = {
  'a comma more in the first row': (PLAIN.replace('0.5\n', '0.5,\n'), {}, r'line 2 .* 4 fields, line 1 names 3'),
  'thousands without quotes': (PLAIN.replace('2048', '2,048'), {}, r"line 5 .* 4 fields.*'2,048,8,0.36'; quote"),
  'thousands without quotes in every row': (
    PLAIN.replace('512', '5,120').replace('256', '2,560').replace('1024', '1,024').replace('2048', '2,048'),
    {},
    r'line 2 .* 4 fields.*--thousands=,',
  ),
  'row names without a name': ('n_latents,k,nmse\n0,256,4,0.5\n1,512,4,0.4\n', {}, 'line 2 .*name every column'),
  'a field missing': (PLAIN.replace('4,0.45', '0.45'), {}, 'line 3 .* 2 fields, line 1 names 3'),
  'a name twice': (PLAIN.replace('k,', 'n_latents,'), {}, r"line 1 .* names 'n_latents' twice \(fields 1 and 2\)"),
  'a name twice but for spaces': (PLAIN.replace('k,', ' nmse,'), {}, "names 'nmse' twice"),
  'no header': (PLAIN.split('\n', 1)[1], {}, 'line 1 .* numbers where the names'),
  'a header that is a comment': ('# ' + PLAIN, {}, 'line 2 .* numbers where the names .*not with #'),
  'two files joined': (PLAIN + PLAIN, {}, r'line 6 .* repeats the header of line 1.*--by=COL'),
  'a column without a name': (PLAIN.replace(',k,', ',,'), {}, 'line 1 .* no name for field 2'),
  'semicolons': (PLAIN.replace(',', ';'), {}, 'one name, .*--sep=";"'),
  'tabs': (PLAIN.replace(',', '\t'), {}, '--sep=tab'),
  'a note to a spreadsheet': ('sep=;\n' + PLAIN.replace(',', ';'), {'sep': ';'}, 'line 1 .*remove it'),
  'a title above the header': ('Our runs,,\n' + PLAIN, {}, 'line 2 .* 3 fields, line 1 names 1'),
  'a quote left open': (PLAIN + '"4096,8,0.3\n', {}, 'line 6 .* cannot be read'),
  'UTF-16': (PLAIN.encode('utf-16'), {}, 'is UTF-16.*--encoding=utf-16'),
  'UTF-16 without a mark': (PLAIN.encode('utf-16-le'), {}, 'is UTF-16.*--encoding=utf-16'),
  'Latin-1': (PLAIN.encode() + 'é,8,1\n'.encode('latin-1'), {}, 'byte 0xe9 in line 6 .*--encoding=latin-1'),
  'a NUL byte': (PLAIN + '4096,\0,0.3', {}, 'line 6 .* NUL'),
  'a spreadsheet': (b'PK\x03\x04', {}, 'export the sheet as CSV'),
  'torn gzip': (gzip.compress(PLAIN.encode(), mtime=0)[:-9], {}, 'cannot read'),
  'a JSON array': ('[{"k": 1}]', {}, 'one JSON object a line'),
  'a torn JSON line': ('{"k": 1}\n{"k": ', {}, 'line 2 .* not JSON'),
  'a JSON name twice': ('{"k": 1}\n{"k": 1, "k": 2}', {}, "line 2 .*names 'k' twice"),
  'a JSON number that is none': ('{"k": NaN}', {}, 'line 1 .* not a finite number'),
  'an unknown encoding': (PLAIN, {'encoding': 'utf8000'}, 'utf8000.* not known'),
  'an encoding of no text': (PLAIN, {'encoding': 'base64'}, 'cannot read'),
  'one sign for both': (PLAIN, {'thousands': '.'}, '--thousands=. is the decimal sign too; add --decimal=,'),
  'a separator of two': (PLAIN, {'sep': ', '}, '--sep'),
  'a decimal letter': (PLAIN, {'decimal': 'p'}, '--decimal'),
  'thousands by digits': (PLAIN, {'thousands': '0'}, '--thousands'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_read_refuses_in_one_line(read, case):
  content, how, words = REFUSED[case]
  with pytest.raises(UserError, match=words) as caught:
    read(content, **how)
  assert '\n' not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
  ('change', 'how', 'words'),
  [
    (('2048', '"2,048"'), {}, "n_latents='2,048' in line 5 of .*--thousands=, .*--decimal=,"),
    (('2048', "2'048"), {}, r'n_latents="2\'048" in line 5|n_latents=.*line 5 .*--thousands="\'"'),
    (('2048', '2 048'), {}, "line 5 .*' ' between groups"),
    (('2048', '2.048.000'), {}, 'line 5 .*--thousands=. --decimal=,'),
    (('2048', '1_024'), {}, "line 5 .*'_' between groups"),
    (('2048', '20,48'), {'thousands': '.', 'decimal': ','}, None),
    (('2048', '"20,48"'), {'thousands': ','}, "n_latents='20,48' in line 5"),  # groups have three digits
    (('0.36', '"0,36"'), {}, "nmse='0,36' in line 5 .*not a number; a decimal comma is --decimal=,"),
    (('0.36', '36 %'), {}, 'line 5 .*percent'),
    (('0.36', ''), {}, 'nmse=nan in line 5 of'),
    (('0.36', 'NA'), {}, 'nmse=nan in line 5 of'),
    (('0.36', 'inf'), {}, 'nmse=inf in line 5 of'),
    (('0.36', '-0.36'), {}, 'nmse=-0.36 in line 5 of'),
    (('256', '0'), {}, 'n_latents=0 in line 2 of'),
    (('256,4,0.5', 'latents,latents,1'), {}, "n_latents='latents' in line 2 .*units"),
    (('0.36', '0.36\nTotal,,'), {}, "n_latents='Total' in line 6"),
    (('0.36', 'true'), {}, "nmse='true' in line 5"),
  ],
)
def test_a_value_that_is_no_number_is_named_with_its_line_and_the_flag_to_give(read, change, how, words):
  text = PLAIN.replace(*change)
  if words is None:  # a comma more than the header has
    with pytest.raises(UserError, match='line 5'):
      read(text, **how)
    return
  with pytest.raises(UserError, match=words) as caught:
    table.positive(read(text, **how), ['n_latents', 'nmse'])
  assert '\n' not in str(caught.value)


def test_point_in_a_file_of_decimal_commas_is_named(read):
  text = 'n_latents;k;nmse\n256;4;0,5\n512;4;0,45\n1024;8;0.4\n'
  with pytest.raises(UserError, match=r"nmse='0\.4' in line 4 .*--decimal=,"):
    table.positive(read(text, sep=';', decimal=','), ['nmse'])


def test_thousands_in_a_file_of_decimal_commas_are_named(read):
  with pytest.raises(UserError, match=r"n='1\.024' in line 3 .*--thousands=\. --decimal=,"):
    table.positive(read('n;y\n512;0,5\n1.024;0,4\n', sep=';', decimal=','), ['n'])


def test_columns_are_numbers_truth_values_or_texts(read):
  rows = read('n, total,id,flag,note,empty\n'.replace('n, total', '"n, total"') + '1,01,true,a,\n2e3,2,False,"b\nc",\n')
  assert list(rows.columns) == ['n, total', 'id', 'flag', 'note', 'empty']
  assert rows['n, total'].tolist() == [1.0, 2000.0]
  assert rows['id'].tolist() == ['01', '2']  # a hash is no number
  assert rows['flag'].tolist() == [True, False] and rows['note'].tolist() == ['a', 'b\nc']
  assert rows['empty'].isna().all() and rows.index.tolist() == [2, 3]


def test_index_column_of_pandas_keeps_the_others_in_place(read):
  is_plain(read(pd.DataFrame(ROWS, columns=['n_latents', 'k', 'nmse']).to_csv()).drop(columns='Unnamed: 0'))


@pytest.mark.parametrize('value', ['yes', '2', 'TRUE!'])
def test_truth_that_is_neither_true_nor_false_is_named(value):
  points = pd.DataFrame(ROWS, columns=['n_latents', 'k', 'nmse']).assign(no_better_than_mean='false')
  points.loc[2, 'no_better_than_mean'] = value
  with pytest.raises(UserError, match=r'no_better_than_mean=.* in row 3 is neither true nor false'):
    fit.fit_law(points, 'power_no_floor', bootstrap=0)


@pytest.mark.parametrize('value', ['true', 'True', True, 1])
def test_truth_is_read_as_it_is_written(value):
  points = pd.DataFrame({'no_better_than_mean': [value, None]})
  assert len(table.useful(points)) == 1


def test_published_points_with_commas_at_the_end_of_all_lines_are_fitted_as_published(read):
  constants = []
  for end in ('', ','):
    text = '\n'.join(line + end * (i > 0) for i, line in enumerate(GAO.read_text().split()))
    found = fit.fit_law(read(text), y='normalized_mse', bootstrap=0)
    constants.append(found.params['alpha']['estimate'])
  assert constants[0] == constants[1] == pytest.approx(-0.4224, abs=1e-3)


def test_file_of_any_size_is_read_up_to_a_bound(read, monkeypatch):
  monkeypatch.setattr(read_table, 'MOST_ROWS', 3)
  with pytest.raises(UserError, match='more than 3 rows'):
    read(PLAIN)
  monkeypatch.setattr(read_table, 'MOST_BYTES', 50)
  for data in (PLAIN.encode(), gzip.compress(PLAIN.encode() * 1000, mtime=0)):
    with pytest.raises(UserError, match='more than 50 bytes'):
      read(data)
  with pytest.raises(UserError, match='more than 50 bytes'):
    table.read_csv('/dev/zero')
  files.replace('memory://large.csv', PLAIN.encode())
  with pytest.raises(UserError, match='more than 50 bytes'):
    table.read_csv('memory://large.csv')


def packed(table: pd.DataFrame, **more) -> bytes:
  sink = io.BytesIO()
  table.to_parquet(sink, **more)
  return sink.getvalue()


def test_parquet_is_told_by_its_first_bytes(read):
  plain = pd.DataFrame(ROWS, columns=['n_latents', 'k', 'nmse'])
  is_plain(read(packed(plain), 't.csv'))
  named = read(packed(plain.set_index('n_latents')), 't.parquet')
  assert list(named['n_latents']) == list(plain['n_latents'])


@pytest.mark.parametrize(
  ('data', 'words'),
  [
    (b'PAR1 and the rest', 'as Parquet'),
    (packed(pd.DataFrame({'n': [1.0], 'k': [2.0]}))[:-20] + b'PAR1', 'as Parquet'),
    (packed(pd.DataFrame({'n': [1.0], ' n': [2.0]})), "names 'n' twice"),
    (packed(pd.DataFrame({'n': np.zeros(200_000)})), '200000 rows'),
  ],
  ids=['damaged', 'cut', 'a name twice', 'too many rows'],
)
def test_parquet_that_cannot_be_believed_is_one_line(read, data, words):
  with pytest.raises(UserError, match=words) as refused:
    read(data, 't.parquet')
  assert '\n' not in str(refused.value)


def test_parquet_without_pyarrow_names_what_to_install(read, monkeypatch):
  monkeypatch.setitem(sys.modules, 'pyarrow', None)
  with pytest.raises(UserError, match='pip install pyarrow'):
    read(b'PAR1 and the rest', 't.parquet')


@settings(max_examples=60, deadline=None)
@example(b',"\x01\n\x01"\r\x01')  # the message names a column with a line break in it
@given(st.binary(max_size=60) | st.text('n,k;"\n\t #01.\r', max_size=40).map(str.encode))
def test_read_survives_any_bytes(data):
  files.replace('memory://any.csv', data)
  try:
    rows = table.read_csv('memory://any.csv')
  except UserError as error:
    assert '\n' not in str(error)
  else:
    assert len(rows) and rows.columns.is_unique


@settings(max_examples=60, deadline=None)
@given(st.integers(-(10**17), 10**17) | st.floats(allow_nan=False))
def test_number_is_what_python_reads_and_groups_change_nothing(value):
  assert notation.Notation().number(str(value)) == value
  if isinstance(value, int):
    grouped = f'{value:,}'
    assert notation.Notation(thousands=',').number(grouped) == value
    assert notation.Notation(decimal=',', thousands='.').number(grouped.replace(',', '.')) == value


def test_fit_command_takes_the_notation_and_quoted_names(tmp_path, capsys):
  text = '"n, all";loss\n256;0,5\n512;0,45\n1.024;0,41\n2.048;0,375\n'
  (tmp_path / 'g.csv').write_bytes(text.encode('latin-1'))
  out = tmp_path / 'fit.json'
  for x in ('n, all', '"n, all"'):
    with pytest.raises(SystemExit) as code:
      fit.main(
        [
          str(tmp_path / 'g.csv'),
          '--law=power_no_floor',
          f'--x={x}',
          '--y=loss',
          '--bootstrap=0',
          f'--json={out}',
          '--sep=;',
          '--decimal=,',
          '--thousands=.',
          '--encoding=latin-1',
        ]
      )
    assert code.value.code == 0
    record = json.loads(out.read_text())
    assert record['x'] == ['n, all'] and record['params']['b']['estimate'] == pytest.approx(0.138, abs=2e-3)
  with pytest.raises(SystemExit):
    fit.main([str(tmp_path / 'g.csv'), '--sep=;', '--x="n'])
  assert capsys.readouterr().err.count('\n') == 1
