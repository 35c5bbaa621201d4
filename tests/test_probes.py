"""Probes: the best latent is found, halves share no document, and tables that nobody should believe are refused."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import scipy.optimize

from sae_jax.errors import UserError
from sae_jax.measures import examples, newton, probes, tables, tasks
from sae_jax.measures.measure import Unit
from sae_jax.measures.probes import Probes
from tests import measured
from tests.test_harvest import toy  # noqa: F401  the toy subject's fixture

RIDGE = 1e-4
LN2 = math.log(2)


@pytest.fixture
def shared(toy, tmp_path):  # noqa: F811
  return measured.inputs(tmp_path / 'inputs')


def planted(rng, n=400, columns=300, w=1.7, b=-0.6, at=271):
  z_BF = rng.normal(3, 2, (n, columns)).astype(np.float32)
  y_B = (rng.uniform(size=n) < 1 / (1 + np.exp(-(w * z_BF[:, at] + b - 3 * w)))).astype(int)
  return z_BF, y_B


def slow(z_B, y_B):
  """The same by a general optimiser: the cross-entropy at the minimum with the ridge."""
  u_B = (z_B - z_B.mean()) / (z_B.std() or 1)
  fit = scipy.optimize.minimize(
    lambda p: newton.cross_entropy(p[0], p[1], u_B, y_B) + RIDGE / 2 * p[0] ** 2, [0.0, 0.0], tol=1e-12
  )
  return newton.cross_entropy(*fit.x, u_B, y_B)


def test_a_planted_latent_is_chosen_and_its_probe_recovered():
  z_BF, y_B = planted(np.random.default_rng(0), n=20_000, columns=40, at=31)
  found = newton.best(z_BF, y_B, RIDGE)
  assert found.column == 31
  assert found.weight == pytest.approx(1.7, abs=0.08) and found.bias == pytest.approx(-0.6 - 3 * 1.7, abs=0.25)
  assert found.loss == pytest.approx(newton.cross_entropy(found.weight, found.bias, z_BF[:, 31], y_B), abs=1e-6)


def test_newton_ends_where_a_general_optimiser_does():
  rng = np.random.default_rng(1)
  z_BF, y_B = planted(rng, columns=24, at=3)
  z_BF[:, 8:16] = np.where(rng.uniform(size=(400, 8)) < 0.03, z_BF[:, 8:16] + 4 * y_B[:, None], 0)  # rare codes
  z_BF[:, 16:20] *= np.float32([1e-4, 1e4, 1, 1])
  z_BF[:, 20:] += np.float32(100) * rng.standard_t(1.2, (400, 4)).astype(np.float32)  # far outliers
  losses = np.asarray(newton.fitted(z_BF, y_B, RIDGE)[2])
  np.testing.assert_allclose(losses, [slow(z.astype(np.float64), y_B) for z in z_BF.T], atol=2e-5)


def test_separable_stays_finite_and_a_constant_knows_nothing():
  y_B = np.repeat([0, 1], 100)
  z_BF = np.stack([y_B, 1 - y_B, np.zeros(200), np.full(200, 0.1), 1e-20 * y_B, np.eye(200)[150]], axis=1)
  weight_F, bias_F, loss_F = (np.asarray(a) for a in newton.fitted(z_BF, y_B, RIDGE))
  assert np.isfinite(weight_F).all() and np.isfinite(bias_F).all()
  assert (loss_F[:2] < 0.005).all()
  np.testing.assert_allclose(loss_F[2:4], LN2, atol=1e-6)
  assert (weight_F[2:4] == 0).all()
  assert LN2 - 0.01 < loss_F[5] < LN2  # one example of two hundred is known


def test_what_fills_up_changes_nothing():
  z_BF, y_B = planted(np.random.default_rng(2))
  more_BF = np.concatenate([z_BF, 1e3 * np.ones((100, 300), np.float32)])
  for one, other in zip(newton.fitted(z_BF, y_B, RIDGE), newton.fitted(more_BF, y_B, RIDGE), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def run_of(shared, of=None, **settings):
  one = Probes(**settings)
  units = [one.run(unit, of or measured.judged(measured.cell()), shared) for unit in range(one.units(shared))]
  return [unit.record for unit in units if unit.record['train']], one.values(units)


@pytest.mark.parametrize('family', ['topk', 'relu'])
def test_the_best_latent_is_that_of_all_alone(shared, monkeypatch, family):
  """Block by block it is the same, and each column is what the family says."""
  of = measured.judged(measured.of_family(family) if family != 'topk' else measured.cell())
  records, values = run_of(shared, of)
  assert values['tasks'].value == len(records) >= 1
  task = next(iter(records))
  found = examples.of_windows(task['task'], shared, 512, 0)
  halves = [np.asarray(of.form.unit(x)[0]) for x in (found.x_train_BD, found.x_held_out_BD)]
  labels = [found.y_train_B, found.y_held_out_B]
  codes = of.form.codes(of.params, halves[0])
  dense_BF = np.zeros((len(halves[0]), measured.F), np.float32)
  if family == 'topk':
    np.put_along_axis(dense_BF, np.asarray(codes.idx_BK), np.asarray(codes.z_BK), axis=1)
  else:
    dense_BF = np.asarray(codes.z_BF)
  train = {'pre': np.asarray(of.form.pre(of.params, halves[0])), 'codes': dense_BF, 'channels': halves[0]}
  for kind, z_BF in train.items():
    losses = [slow(z.astype(np.float64), labels[0]) for z in z_BF.T]
    assert task[f'{kind}_train'] == pytest.approx(min(losses), abs=1e-4)
    assert losses[task[f'{kind}_column']] == pytest.approx(min(losses), abs=1e-4)
  probe = newton.best(train['pre'], labels[0], RIDGE)
  z_B = np.asarray(of.form.pre(of.params, halves[1]))[:, probe.column]
  assert task['pre'] == pytest.approx(newton.cross_entropy(probe.weight, probe.bias, z_B, labels[1]), abs=1e-5)
  monkeypatch.setattr(probes, '_COLUMNS', 20)
  monkeypatch.setattr(probes, '_NUMBERS', 300 * measured.F)
  for record, other in zip(records, run_of(shared, of)[0], strict=True):
    assert {key: record[key] for key in record if key.endswith('column')} == {
      key: other[key] for key in other if key.endswith('column')
    }
    assert record['codes'] == pytest.approx(other['codes'], abs=1e-5)


def test_halves_are_balanced_and_their_windows_share_no_document(shared):
  train, held_out = ({int(i) for b in range(shared.blocks(s)) for i in shared.block(s, b).windows.document_W}
                     for s in ('train', 'held_out'))  # fmt: skip
  assert train and held_out and not train & held_out
  found = examples.of_windows('is_late_in_the_window', shared, 20, 0)
  assert found.y_train_B.sum() * 2 == len(found.y_train_B) == 40 == len(found.x_held_out_BD)
  counted_BD = np.concatenate([shared.block('train', i).counted_BD for i in range(shared.blocks('train'))])
  assert {row.tobytes() for row in found.x_train_BD} <= {row.tobytes() for row in counted_BD}
  other = examples.of_windows('is_late_in_the_window', shared, 20, 1)
  assert not np.array_equal(found.x_train_BD, other.x_train_BD)


def test_values_are_means_over_tasks_and_none_without_a_task():
  losses = {f'{kind}{half}': 0.5 for kind in ('pre', 'codes') for half in ('', '_train')}
  records = [{'train': 40, **losses, 'channels': 0.5 + gap, 'channels_train': 0.5} for gap in (0.1, 0.3, -0.1)] + [
    {'train': 0}
  ]
  values = Probes().values([Unit(record) for record in records])
  assert values['pre_below_channels'].value == pytest.approx(0.1) and values['tasks'].value == 3
  assert values['pre_below_channels'].se == pytest.approx(0.2 / math.sqrt(3))
  assert values['pre_wins'].value == pytest.approx(2 / 3)
  assert math.isnan(Probes().values([Unit({'train': 0})])['pre'].value)


TEXT = 'In 1862 we of the Union, by 37 acts, went home. "Not so," said the acting Governor. He went to the Senate'


def read(text, at, name='1862-Lincoln-1.txt', position=20):
  """The token that covers a piece of a text, at its first occurrence."""
  begin = text.index(at)
  spans = np.array([[0, begin], [begin, begin + len(at)]])
  ((_, token),) = tasks.tokens(text, name, spans, 0, np.array([2]), 4)
  return tasks.dataclasses.replace(token, position=position)


@pytest.mark.parametrize(
  'task, yes, no, unasked',
  [
    ('has_a_digit', ' 37', ' acts', None),
    ('is_in_a_long_number', '86', None, ' by'),
    ('is_punctuation', ' "', ' by', None),
    ('ends_a_clause', ',', ' by', None),
    ('ends_a_sentence', '.', ',', ' by'),
    ('begins_a_sentence', ' He', ' went', '.'),
    ('begins_a_word', ' act', 'ing', ','),
    ('ends_a_word', 'ing', ' act', ','),
    ('is_a_function_word', ' of', ' home', ' act'),
    ('is_a_preposition', ' by', ' home', ' act'),
    ('is_a_pronoun', ' we', ' home', None),
    ('word_ends_in_ing', 'ing', 'Governor', ' the'),
    ('is_a_long_word', ' Governor', ' acting', ' act'),
    ('word_before_is_of', ' the', ' home', None),
    ('next_is_the', ' of', ' acting', ' act'),
    ('next_is_a_comma', ' Union', ' home', None),
    ('next_ends_the_sentence', ' home', ' Union', None),
    ('next_is_capitalised', ' acting', ' said', None),
    ('sentence_had_a_number', ' home', ' Governor', 'In'),
    ('sentence_had_a_negation', ' Governor', ' home', None),
    ('sentence_had_we', ' home', ' Governor', None),
    ('word_was_seen_in_the_window', None, ' home', ' of'),
  ],
)
def test_tasks_read_characters(task, yes, no, unasked):
  for piece, wanted in ((yes, True), (no, False), (unasked, None)):
    if piece is not None:
      assert tasks.TASKS[task](read(TEXT, piece)) is wanted, piece
      assert tasks.TASKS[task](read(TEXT, piece.strip())) is wanted, 'a tokenizer that leaves spaces out'


@pytest.mark.parametrize(
  'task, year, president, wanted',
  [
    ('document_is_before_1900', 1862, 'Lincoln', True),
    ('document_is_republican', 1862, 'Lincoln', True),
    ('document_is_republican', 1936, 'Roosevelt', False),
    ('document_is_republican', 1905, 'Roosevelt', True),
    ('document_is_republican', 1866, 'Johnson', None),
    ('document_is_republican', 1830, 'Jackson', None),
    ('document_was_spoken', 1862, 'Lincoln', False),
    ('document_was_spoken', 1790, 'Washington', True),
  ],
)
def test_tasks_about_documents(task, year, president, wanted):
  assert tasks.TASKS[task](read(TEXT, ' home', f'{year}-{president}-1.txt')) is wanted
  assert tasks.TASKS[task](read(TEXT, ' home', 'other.txt')) is None
  assert tasks.TASKS[task](read(TEXT, ' home', f'{year}-{president}-1.txt', position=3)) is None


def table(tmp_path, text, name='t.csv'):
  path = tmp_path / name
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  return str(path)


def letters(n, seed=0):
  """Texts for the toy subject: label 1 ends in a vowel."""
  rng = np.random.default_rng(seed)
  rows = []
  for i in range(n):
    body = ''.join(rng.choice(list('bcdfgh'), rng.integers(1, 6)))
    rows.append({'text': body + 'bae'[2 if i % 2 else 0], 'label': i % 2, 'document': f'd{i // 3}'})
  return rows


def test_a_table_reads_the_last_token_of_each_text(shared, tmp_path):
  path = table(tmp_path, '\n'.join(json.dumps(row | {'task': 'vowel'}) for row in letters(200)), 't.jsonl')
  (record,), values = run_of(shared, table=path)
  assert record['task'] == 'vowel' and record['pre_train'] < LN2 - 0.02 and values['tasks'].value == 1
  rows = tables.tasks(tables.read(path), path)['vowel']
  found = examples.of_table('vowel', rows, Probes(table=path).table_sha256, shared, 512, 0)
  train, held_out = tables.chosen('vowel', rows, 512, 0)
  assert not {row.document for row in train} & {row.document for row in held_out}
  assert not {row.text for row in train} & {row.text for row in held_out}
  for i in (0, 7, len(held_out) - 1):
    ids = shared.subject.encode([held_out[i].text])[0][: shared.window_tokens - 1]
    ids = np.concatenate([[shared.subject.start_token], ids])[None].astype(np.int32)
    x_D = np.asarray(shared.subject.residual(ids, shared.site))[0, -1]
    np.testing.assert_allclose(found.x_held_out_BD[i], x_D, rtol=1e-4, atol=1e-5)
    assert found.y_held_out_B[i] == held_out[i].label


def test_the_content_of_a_table_is_a_setting_and_its_path_is_none(tmp_path):
  text = 'text,label\n' + ''.join(f'{row["text"]},{row["label"]}\n' for row in letters(400))
  one, moved = (tasks.dataclasses.asdict(Probes(table=table(tmp_path, text, name))) for name in ('a.csv', 'b.csv'))
  changed = tasks.dataclasses.asdict(Probes(table=table(tmp_path, text + 'zzz,1\n')))
  assert one == moved != changed and set(one) == {'examples', 'seed', 'ridge', 'table_sha256'}


ROWS = ''.join(f'"text {i}",{i % 2}\n' for i in range(80))


@pytest.mark.parametrize(
  'text, name, said',
  [
    (b'text,label\n\xff\xfe,1\n', 't.csv', r'is not text in UTF-8 \(byte 11\); convert it'),
    ('', 't.csv', "has no column 'text'"),
    ('text,label\n', 't.csv', 'has no rows'),
    ('text,class\na,1\n', 't.csv', "has no column 'label'"),
    ('text,label\na\n', 't.csv', 'line 2: it has not as many fields as the first line'),
    ('text,label\na,b,1\n', 't.csv', 'line 2: it has not as many fields'),
    ('text,label\na,2\n', 't.csv', "line 2: label='2' is neither 0 nor 1"),
    ('text,label\n,1\n', 't.csv', 'line 2: the text is empty'),
    (f'text,label\n"{"a" * 100_001}",1\n', 't.csv', 'field larger than field limit'),
    ('text,label\n"a,1\n', 't.csv', 'write it as CSV'),
    ('[' * 100_000, 't.jsonl', 'line 1: it is no JSON object'),
    ('{"text": "a", "label": 1}\n[]', 't.jsonl', 'line 2: it is no JSON object'),
    ('{"text": 7, "label": 1}', 't.jsonl', 'line 1: text is missing or of another type'),
    ('{"text": "a"}', 't.jsonl', 'line 1: label is missing'),
    ('{"text": "a", "label": NaN}', 't.jsonl', 'label is missing or of another type'),
    ('{"text": "\\ud800", "label": 1}', 't.jsonl', 'half of a character'),
    ('text,label\n' + ROWS.replace(',0', ',1'), 't.csv', "task 'table' has 0 texts of label 0 and 80 of label 1"),
    ('text,label\n' + ''.join(ROWS.splitlines(True)[:20]), 't.csv', 'give at least 32 of each'),
    (
      'text,label,document\n' + ROWS.replace('\n', ',one\n'),
      't.csv',
      'so that both halves have 16 of each',
    ),
  ],
)
def test_hostile_tables_are_refused_in_one_line(tmp_path, text, name, said):
  with pytest.raises(UserError, match=said) as caught:
    Probes(table=table(tmp_path, text, name))
  assert '\n' not in str(caught.value)


def test_tables_that_are_missing_or_too_large_are_refused(tmp_path, monkeypatch):
  with pytest.raises(UserError, match='there is no such file'):
    Probes(table=str(tmp_path / 'none.csv'))
  monkeypatch.setattr(tables, '_BYTES', 10)
  with pytest.raises(UserError, match='cannot be read'):
    Probes(table=table(tmp_path, 'text,label\na,1\n'))


def test_rows_that_share_a_text_or_a_document_stay_together():
  rows = [tables.Row(i, f't{i % 37}', i % 2, f'd{i // 2}') for i in range(74)]  # one long chain of shared texts
  first, second = tables.halves(rows, ('x',))
  assert sorted(map(len, (first, second))) == [0, 74]
  free = [tables.Row(i, f't{i}', i % 2, f'd{i // 2}') for i in range(74)]
  assert sorted(map(len, tables.halves(free, ('x',)))) in ([36, 38], [37, 37])


def test_values_need_no_jax():
  code = 'import sys; import sae_jax.measures.probes as p; p.Probes().values([]); sys.exit("jax" in sys.modules)'
  assert subprocess.run([sys.executable, '-c', code], check=False).returncode == 0
