"""What `sae_jax` writes is what `analysis` and `sweeps` read: two cells really trained, and every name followed."""

import json

import numpy as np

import analysis
from analysis import report
from sae_jax import schema
from sweeps import ledger, status
from tests import cells

# The NMSE of the shared cell, to four digits. Every path of the step may change together, so parity tests cannot see it.
GOLDEN = '0.2498'


def numeric(fields) -> list[str]:
  return [field.name for field in fields if field.kind in (int, float) and not field.may]


def test_every_column_of_a_trained_cell_is_there_and_finite(trained):
  table = analysis.load_ledger(str(trained))
  assert len(table) == 2 and table.attrs['warnings'] == [] and table['verified'].all()
  for name in numeric(schema.RESULTS):
    assert np.isfinite(table[name].astype(float)).all(), name
  for name in (field.name for field in schema.RESULTS if not field.may):
    assert table[name].notna().all(), name
  assert table['k'].notna().all() and table['sparsity'].isna().all()
  for name in set(schema.FROM_CONFIG.values()) - {'sparsity'}:  # asked for instead of k
    assert table[name].notna().all(), name
  assert (table['nmse'] < 1).all() and table['seed'].tolist().count(0) == 1


def test_every_column_of_a_curve_is_there_and_finite(trained):
  curves = analysis.load_curves(str(trained))
  for name in numeric(schema.CURVES):
    assert np.isfinite(curves[name].astype(float)).all(), name
  table = analysis.load_ledger(str(trained)).set_index('id')
  for cell_id, curve in curves.groupby('id'):
    last = curve.iloc[-1]
    assert last['step'] == table.loc[cell_id, 'steps']
    for name in numeric(schema.MEASURED):
      assert last[name] == table.loc[cell_id, name], name


def test_files_hold_the_names_of_the_schema_and_no_others(trained):
  for folder in trained.glob('cells/*'):
    result = json.loads((folder / schema.RESULT).read_text())
    always = {'k', 'n_cores', 'cpu', 'artifact_sha256', 'artifact_bytes'}  # in what is trained today on a cpu
    assert set(schema.content(result)) == {f.name for f in schema.RESULTS if not f.may} | always
    for line in (folder / schema.METRICS).read_text().splitlines():
      fields = [field.line for field in schema.CURVES if field.line and not field.may]
      assert set(schema.content(json.loads(line))) == set(fields)
    info = json.loads((folder / schema.ARTIFACT / schema.ARTIFACT_INFO).read_text())
    assert {field.name for field in schema.ARTIFACTS if not field.may} <= set(info)


def test_report_and_status_read_a_trained_ledger(trained, tmp_path):
  found = report.analyse(str(trained), bootstrap=0)
  report.write(found, str(tmp_path), 'trained')
  assert len(found.done) == 2 and (tmp_path / 'index.html').exists()
  rows = status.report(ledger.Ledger(str(trained)), 3)['cells']
  assert {row['id']: row['nmse'] for row in rows} == found.done.set_index('id')['nmse'].to_dict()


def test_golden_number(trained):
  nmse = analysis.load_ledger(str(trained)).set_index('id').loc[cells.cell().id, 'nmse']
  assert f'{nmse:.4f}' == GOLDEN, (
    f'the NMSE of the shared cell went from {GOLDEN} to {nmse:.4f}. A refactor must not move it. If the mathematics, a '
    'default or a recipe was meant to change: say so in LOG.md, give the new recipe a new name, set GOLDEN.'
  )
