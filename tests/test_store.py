"""Activation stores: what is read is what was written, at any position, or an error that names the block."""

import concurrent.futures
import dataclasses
import json
import resource
import shutil

import numpy as np
import pytest

from sae_jax import config, schema
from sae_jax.data import normalize, order, source, store, store_writer
from sae_jax.errors import UserError

D, BLOCK_WINDOWS, WINDOW, TRAIN, HELD_OUT = 7, 3, 6, 53, 19  # 15 tokens a block: 4 blocks and 2
SETTINGS = {
  'subject': 'toy',
  'site': 'resid_post.1',
  'text': 'none',
  'normalize': 'center_unit',
  'window_tokens': WINDOW,
  'block_windows': BLOCK_WINDOWS,
  'store_tokens': TRAIN,
  'held_out_tokens': HELD_OUT,
  'dtype': 'float32',
  'seed': 2,
}


def activations(name: str) -> np.ndarray:
  rng = np.random.default_rng(len(name))
  return (3 + 5 * rng.standard_normal(({'train': TRAIN, 'held_out': HELD_OUT}[name], D))).astype(np.float32)


def open_writer(path, scale: float | None = None, **changes) -> store_writer.StoreWriter:
  return store_writer.StoreWriter(
    str(path),
    d_model=D,
    settings=SETTINGS | changes,
    provenance={'maker': 'test'},
    flops_per_token=11.0,
    scale=scale,
  )


def fill(writer: store_writer.StoreWriter, blocks: int | None = None) -> list[tuple[str, int]]:
  """Writes up to `blocks` blocks that are not done, and says which."""
  written = []
  for name, stream in writer.streams.items():
    for block in range(stream.blocks):
      if len(written) != blocks and not writer.done(name, block):
        writer.write(name, block, activations(name)[block * 15 : block * 15 + 15])
        written.append((name, block))
  return written


def write_store(path, **changes) -> dict:
  writer = open_writer(path, **changes)
  fill(writer)
  return writer.finish()


def cell(path, **changes) -> config.Cell:
  flat = {
    'sae.n_latents': 8,
    'sae.k': 2,
    'data.path': str(path),
    'data.seed': 2,
    'train.batch_tokens': 4,
    'train.tokens': 8,
    'eval.tokens': 4,
    'eval.batch_tokens': 2,
  }
  return config.resolve(config.override(config.template(), flat | changes))


@pytest.fixture(scope='module')
def pristine(tmp_path_factory):
  path = tmp_path_factory.mktemp('store') / 's'
  write_store(path)
  return path


@pytest.fixture
def copy(pristine, tmp_path):
  return shutil.copytree(pristine, tmp_path / 'copy')


def expected(epochs: int) -> np.ndarray:
  """The stream written out: normalised rows, blocks in the order of each epoch."""
  x_BD = normalize.normalize(activations('train'), 'center_unit')[0]
  blocks = np.split(x_BD, [15, 30, 45])
  orders = [range(4), *(order.permutation(4, 'blocks', 2, e) for e in range(1, epochs))]
  return np.concatenate([blocks[b] for blocks_of_epoch in orders for b in blocks_of_epoch])


@pytest.mark.parametrize('start,stop', [(0, 1), (14, 16), (3, 50), (40, 100), (0, 159), (158, 159), (53, 53)])
def test_rows_cross_blocks_and_epochs(pristine, start, stop):
  rows = store.Store(cell(pristine, **{'data.epochs': 3})).rows(start, stop)
  assert rows.dtype == np.float32
  np.testing.assert_array_equal(rows, expected(3)[start:stop])


def test_held_out_rows_are_those_written(pristine):
  held_out = store.Store(cell(pristine)).held_out
  x_BD = normalize.normalize(activations('held_out'), 'center_unit')[0]
  np.testing.assert_array_equal(np.concatenate([held_out(0, 13), held_out(13, 19)]), x_BD)


def test_source_is_opened_by_the_config_and_says_where_it_comes_from(pristine):
  opened = source.open_source(cell(pristine))
  assert (opened.d_model, opened.flops_per_token) == (D, 11.0)
  assert opened.provenance['maker'] == 'test'
  facts = {'subject': 'toy', 'site': 'resid_post.1', 'normalize': 'center_unit'}
  assert facts.items() <= opened.provenance.items()
  assert opened.provenance['identity'] == cell(pristine).data.identity
  json.dumps(opened.provenance)


def test_positions_past_the_end_are_refused(pristine):
  opened = store.Store(cell(pristine, **{'data.epochs': 2}))
  with pytest.raises(UserError, match='holds 106 over 2 epochs'):
    opened.rows(100, 107)
  with pytest.raises(UserError, match='holds 19'):
    opened.held_out(0, 20)


def test_float16_store_is_within_its_rounding(tmp_path):
  write_store(tmp_path, dtype='float16')
  rows = store.Store(cell(tmp_path)).rows(0, TRAIN)
  assert rows.dtype == np.float32
  np.testing.assert_allclose(rows, expected(1), rtol=2**-11, atol=1e-7)
  assert (rows != expected(1)).any()


def test_statistics_are_those_of_the_rows(pristine):
  x_BD = expected(1).astype(np.float64)
  raw_BD = activations('train').astype(np.float64)
  statistics = config.read_store_file(str(pristine))['statistics']['train']
  np.testing.assert_allclose(statistics['mean'], x_BD.mean(axis=0), rtol=1e-6)
  assert statistics['variance'] == pytest.approx(np.square(x_BD - x_BD.mean(axis=0)).sum(axis=1).mean())
  centred = raw_BD - raw_BD.mean(axis=1, keepdims=True)
  assert statistics['mean_norm'] == pytest.approx(np.linalg.norm(centred, axis=1).mean())


def test_identity_follows_content_order_and_space(tmp_path, pristine):
  same = write_store(tmp_path / 'same')
  assert same['identity'] == config.read_store_file(str(pristine))['identity']
  others = [write_store(tmp_path / key, **{key: value}) for key, value in (('seed', 5), ('dtype', 'float16'))]
  writer = open_writer(tmp_path / 'content')
  fill(writer, 3)
  changed = activations('train')[45:].copy()
  changed[0, 0] += 1
  writer.write('train', 3, changed)
  fill(writer)
  others.append(writer.finish())
  assert len({meta['identity'] for meta in [same, *others]}) == 4


def test_constant_token_becomes_zero_and_is_counted(tmp_path):
  writer = open_writer(tmp_path)
  x_BD = activations('train')[:15].copy()
  x_BD[4], x_BD[9] = 0.0, 0.1
  writer.write('train', 0, x_BD)
  fill(writer)
  assert writer.finish()['statistics']['train']['zero_tokens'] == 2
  rows = store.Store(cell(tmp_path)).rows(0, 15)
  assert np.isfinite(rows).all()
  assert not rows[[4, 9]].any()


def test_block_of_zeros_is_a_block(tmp_path):
  writer = open_writer(tmp_path)
  writer.write('train', 2, np.zeros((15, D), np.float32))
  assert writer.done('train', 2)
  fill(writer)
  writer.finish()
  assert not store.Store(cell(tmp_path)).rows(30, 45).any()
  store.verify(str(tmp_path))


@pytest.mark.parametrize('killed_after', [0, 1, 5])
def test_writing_resumes_and_looks_unfinished_until_the_end(tmp_path, pristine, killed_after):
  fill(open_writer(tmp_path), killed_after)
  with pytest.raises(UserError, match='no finished activation store'):
    cell(tmp_path)
  writer = open_writer(tmp_path)
  assert len(fill(writer)) == 6 - killed_after
  assert writer.finish() == config.read_store_file(str(pristine))
  assert sorted(p.name for p in tmp_path.iterdir()) == ['held_out', 'store.json', 'train']


@pytest.mark.parametrize('damage', ['flip', 'truncate', 'delete', 'record', 'null'])
def test_resume_writes_a_damaged_block_again(tmp_path, damage):
  fill(open_writer(tmp_path), 3)
  in_journal = damage in ('record', 'null')
  harm(tmp_path / 'journal-train-000001.json' if in_journal else tmp_path / 'train/c/1/0', damage)
  assert ('train', 1) in fill(open_writer(tmp_path))


@pytest.mark.parametrize('key,value', [('site', 'resid_post.2'), ('seed', 9), ('dtype', 'float16')])
def test_unfinished_store_with_other_settings_is_refused(tmp_path, key, value):
  fill(open_writer(tmp_path), 1)
  with pytest.raises(UserError, match=f'{key}={SETTINGS[key]!r}, not {value!r}'):
    open_writer(tmp_path, **{key: value})


def test_finished_store_is_recognised_and_never_overwritten(pristine, tmp_path):
  assert not store_writer.finished(str(tmp_path), SETTINGS, {})
  assert store_writer.finished(str(pristine), SETTINGS, {'maker': 'test'})
  with pytest.raises(UserError, match=r"site='resid_post\.1'"):
    store_writer.finished(str(pristine), SETTINGS | {'site': 'resid_post.3'}, {})
  with pytest.raises(UserError, match='finished store'):
    open_writer(pristine)


def test_full_disk_is_one_line_and_keeps_what_was_written(tmp_path, pristine):
  writer = open_writer(tmp_path)
  fill(writer, 2)
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))  # a file may not grow past 100 bytes
  try:
    with pytest.raises(UserError, match=r'block 2 of train in .* cannot be written'):
      fill(writer)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  writer = open_writer(tmp_path)
  assert len(fill(writer)) == 4
  assert writer.finish() == config.read_store_file(str(pristine))


def test_values_outside_the_dtype_are_refused(tmp_path):
  writer = open_writer(tmp_path, dtype='float16', normalize='none')
  x_BD = activations('train')[:15].copy()
  x_BD[3, 3] = 70_000.0
  with pytest.raises(UserError, match='range of float16; use float32'):
    writer.write('train', 0, x_BD)
  x_BD[3, 3] = np.nan
  with pytest.raises(UserError, match='not finite'):
    writer.write('train', 0, x_BD)


# Numbers of float16 are 6e-8 apart at their smallest, and these rows hold numbers of about 5.
@pytest.mark.parametrize('size, kept', [(1e-8, False), (1e-7, False), (1e-6, True), (1e-3, True)])
def test_rows_that_underflow_in_the_dtype_are_refused(tmp_path, size, kept):
  writer = open_writer(tmp_path, dtype='float16', normalize='none')
  x_BD = np.float32(size) * activations('train')[:15]
  if kept:
    writer.write('train', 0, x_BD)
    return
  with pytest.raises(UserError, match=r'float16 loses a share of .*use float32, normalize=center_unit') as e:
    writer.write('train', 0, x_BD)
  assert '\n' not in str(e.value)


def test_dtype_too_coarse_for_the_variance_about_a_large_mean_is_refused(tmp_path):
  """Each row is held to 11 bits, which is nothing beside the mean and all of the variance that the NMSE is about."""
  writer = open_writer(tmp_path, dtype='float16', normalize='none')
  for name, stream in writer.streams.items():
    for block in range(stream.blocks):
      writer.write(name, block, (1000 + 0.1 * activations(name))[block * 15 : block * 15 + 15])
  with pytest.raises(UserError, match='the 53 train rows: float16 loses a share of'):
    writer.finish()
  assert not (tmp_path / schema.STORE).exists()


def test_share_lost_in_rounding_is_recorded(tmp_path, pristine):
  assert config.read_store_file(str(pristine))['statistics']['train']['lost'] < 1e-14
  assert 1e-9 < write_store(tmp_path, dtype='float16')['statistics']['train']['lost'] < 1e-6


@pytest.mark.parametrize('name', ['train', 'held_out'])
def test_store_of_rows_that_are_all_alike_is_never_finished(tmp_path, name):
  writer = open_writer(tmp_path)
  for array, stream in writer.streams.items():
    for block in range(stream.blocks):
      x_BD = activations(array)[block * 15 : block * 15 + 15]
      writer.write(array, block, np.broadcast_to(activations('train')[0], x_BD.shape) if array == name else x_BD)
  with pytest.raises(UserError, match=f'the {writer.streams[name].tokens} {name} rows have variance .*must vary'):
    writer.finish()


def test_scale_is_recorded_applied_to_both_splits_and_handed_on(tmp_path):
  meta = write_store(tmp_path, scale=0.25, normalize='scale')
  assert meta['scale'] == 0.25
  opened = store.Store(cell(tmp_path))
  np.testing.assert_array_equal(opened.held_out(0, HELD_OUT), 0.25 * activations('held_out'))
  np.testing.assert_array_equal(opened.rows(0, TRAIN), 0.25 * activations('train'))
  assert opened.provenance['scale'] == 0.25
  assert cell(tmp_path).data.normalize == 'scale'
  raw_BD = activations('train').astype(np.float64)
  assert meta['statistics']['train']['mean_norm'] == pytest.approx(np.linalg.norm(raw_BD, axis=1).mean())
  with pytest.raises(UserError, match=r'scale=0.25, not 0.5'):
    other = tmp_path / 'unfinished'
    open_writer(other, scale=0.25, normalize='scale')
    open_writer(other, scale=0.5, normalize='scale')


def test_store_without_a_scale_means_one_and_a_changed_scale_is_refused(copy, tmp_path):
  assert 'scale' not in config.read_store_file(str(copy)) and 'scale' not in store.Store(cell(copy)).provenance
  write_store(tmp_path / 's', scale=0.25, normalize='scale')
  for change in ({'scale': 0.5}, {'scale': None}):
    whole = json.loads((tmp_path / 's' / schema.STORE).read_text())
    (tmp_path / 't').mkdir(exist_ok=True)
    (tmp_path / 't' / schema.STORE).write_text(json.dumps(whole | change))
    with pytest.raises(UserError, match='does not fit its digest'):
      store.read_meta(str(tmp_path / 't'))
    sealed = schema.seal(schema.content(whole) | {'scale': None})
    (tmp_path / 't' / schema.STORE).write_text(json.dumps(sealed))
    with pytest.raises(UserError, match='incomplete'):
      store.read_meta(str(tmp_path / 't'))


def test_norms_whose_squares_float32_does_not_hold_are_recorded(tmp_path):
  writer = open_writer(tmp_path, scale=1e25, normalize='scale')
  for name, stream in writer.streams.items():
    for block in range(stream.blocks):
      writer.write(name, block, np.float32(1e-25) * activations(name)[block * 15 : block * 15 + 15])
  statistics = writer.finish()['statistics']['train']
  assert statistics['mean_norm'] == pytest.approx(1e-25 * np.linalg.norm(activations('train'), axis=1).mean())
  assert statistics['zero_tokens'] == 0


def harm(path, damage: str) -> None:
  data = bytearray(path.read_bytes())
  if damage == 'flip':
    data[37] ^= 1
  if damage in ('truncate', 'record'):
    data = data[: len(data) // 2]
  if damage == 'null':
    data = b'null'
  path.unlink()
  if damage != 'delete':
    path.write_bytes(data)


@pytest.mark.parametrize('damage', ['flip', 'truncate', 'delete'])
def test_damaged_block_is_named_when_it_is_read(copy, damage):
  opened = store.Store(cell(copy))
  intact = (copy / 'train/c/2/0').read_bytes()
  harm(copy / 'train/c/2/0', damage)
  harm(copy / 'held_out/c/1/0', damage)
  np.testing.assert_array_equal(opened.rows(0, 30), expected(1)[:30])  # the blocks before it are good
  with pytest.raises(UserError, match='block 2 of train'):
    opened.rows(29, 31)
  with pytest.raises(UserError, match='block 1 of held_out'):
    opened.held_out(14, 16)
  with pytest.raises(UserError, match=r'2 blocks are missing or changed \(train 2, held_out 1\)'):
    store.verify(str(copy))
  (copy / 'train/c/2/0').write_bytes(intact)
  np.testing.assert_array_equal(opened.rows(29, 31), expected(1)[29:31])


def test_another_width_is_refused(pristine):
  with pytest.raises(UserError, match='d_model=9'):
    cell(pristine, **{'sae.d_model': 9})
  made = cell(pristine)
  wide = dataclasses.replace(made, sae=dataclasses.replace(made.sae, d_model=9))
  with pytest.raises(UserError, match='width 7'):
    store.Store(wide)


@pytest.mark.parametrize('key,value', [('site', 'resid_post.2'), ('subject', 'other'), ('store_tokens', 54)])
def test_setting_that_the_store_has_otherwise_is_refused_with_what_counts(pristine, key, value):
  words = (
    f'data.{key}={value!r} but the store at .* has {SETTINGS[key]!r}, and what is in the store is what counts; drop'
  )
  with pytest.raises(UserError, match=words):
    cell(pristine, **{f'data.{key}': value})
  assert getattr(cell(pristine, **{f'data.{key}': SETTINGS[key]}).data, key) == SETTINGS[key]


def test_store_replaced_after_the_cell_was_made_is_refused(tmp_path):
  write_store(tmp_path / 's')
  made = cell(tmp_path / 's')
  shutil.rmtree(tmp_path / 's')
  write_store(tmp_path / 's', dtype='float16')
  with pytest.raises(UserError, match='identity'):
    store.Store(made)


@pytest.mark.parametrize(
  'key,value',
  [
    ('tokens', 106),
    ('tokens', '53'),
    ('tokens', -1),
    ('block_tokens', 0),
    ('d_model', 8),
    ('blocks', {}),
    ('blocks', {'train': ['x'] * 4, 'held_out': ['y'] * 2}),
    ('schema', 2),
    ('provenance', []),
    ('config', None),
    ('subject_flops_per_token', 'many'),
    pytest.param('subject_flops_per_token', 10**400, id='vast'),
    ('subject_flops_per_token', float('inf')),
  ],
)
def test_edited_store_file_is_refused(copy, key, value):
  meta = json.loads((copy / 'store.json').read_text())
  (copy / 'store.json').write_text(json.dumps(meta | {key: value}))
  with pytest.raises(UserError):
    store.verify(str(copy))


@pytest.mark.parametrize('name', ['statistics', 'provenance', 'subject_flops_per_token'])
def test_changed_fact_outside_the_identity_is_refused(copy, name):
  meta = json.loads((copy / 'store.json').read_text())
  assert meta['identity'] == store_writer.identity(meta) and store_writer.identity(meta | {name: 0}) == meta['identity']
  meta[name] = {'subject_flops_per_token': 12.0}.get(name, {'train': {'mean': [0.0] * D}})
  (copy / 'store.json').write_text(json.dumps(meta))
  for read in (config.read_store_file, store.read_meta):
    with pytest.raises(UserError, match='it does not fit its digest'):
      read(str(copy))
  del meta['digest']  # as if from a version that wrote none: the types are checked
  (copy / 'store.json').write_text(json.dumps(meta))
  assert store.read_meta(str(copy))[name] == meta[name]


def test_flipped_bit_in_the_store_file_is_named_or_changes_nothing(copy):
  path = copy / 'store.json'
  data, true = path.read_bytes(), store.read_meta(str(copy))
  for at in np.linspace(0, len(data) - 1, 60).astype(int).tolist():
    changed = bytearray(data)
    changed[at] ^= 1 << at % 8
    path.write_bytes(changed)
    try:
      assert store.read_meta(str(copy)) == true
    except UserError as error:
      assert len(str(error).replace(str(copy), '')) <= 200 and 'store.json' in str(error)


def test_store_that_claims_more_than_the_disk_holds_takes_no_memory(copy):
  """Also where every file agrees with the claim: the blocks are not there."""
  path, tokens = copy / 'store.json', 10**9
  meta = schema.content(json.loads(path.read_text())) | {
    'schema': 1,
    'tokens': tokens,
    'block_tokens': tokens,
  }
  meta['blocks'] = {name: blocks[:1] for name, blocks in meta['blocks'].items()}
  path.write_bytes(schema.dump(meta | {'identity': store_writer.identity(meta)}))
  with pytest.raises(UserError, match=r'train is \(53, 7\) float32, not'):
    store.verify(str(copy))
  zarr = json.loads((copy / 'train/zarr.json').read_text()) | {'shape': [tokens, D]}
  (copy / 'train/zarr.json').write_text(json.dumps(zarr))
  with pytest.raises(UserError, match='train has chunks of'):
    store.verify(str(copy))
  zarr['chunk_grid']['configuration']['chunk_shape'] = [tokens, D]
  (copy / 'train/zarr.json').write_text(json.dumps(zarr))
  array = store._Array(str(copy), store.read_meta(str(copy)), 'train')
  with pytest.raises(UserError, match='its file has 420 bytes, not 28000000000'):
    array.read(0)
  (copy / 'train/c/0/0').unlink()
  with pytest.raises(UserError, match='its file is missing'):
    array.read(0)


@pytest.mark.parametrize(
  'harm',
  [
    lambda m: m['config'].update(seed='2'),
    lambda m: m['config'].update(more=1),
    lambda m: m['config'].pop('site'),
    lambda m: m.update(tokens=1e9),
    lambda m: m.update(tokens=10**400),
  ],
)
def test_old_store_file_with_wrong_types_is_one_line_for_whoever_makes_cells(copy, harm):
  meta = schema.content(json.loads((copy / 'store.json').read_text())) | {'schema': 1}
  harm(meta)
  (copy / 'store.json').write_text(json.dumps(meta))
  with pytest.raises(UserError, match='not a store description') as refused:
    cell(copy)
  assert len(str(refused.value).replace(str(copy), '')) <= 200


@pytest.mark.parametrize('changed', ['statistics', 'another block', 'plan', 'brackets', 'folder'])
def test_changed_journal_is_not_believed(tmp_path, changed):
  fill(open_writer(tmp_path), 3)
  first, second, plan = (
    tmp_path / name for name in ('journal-train-000000.json', 'journal-train-000001.json', 'journal-plan.json')
  )
  if changed == 'statistics':
    second.write_text(json.dumps(json.loads(second.read_text()) | {'zero_tokens': 7}))
  elif changed == 'another block':
    record = json.loads(first.read_text()) | {'sha256': json.loads(second.read_text())['sha256']}
    second.write_text(json.dumps(record))
  elif changed == 'brackets':
    second.write_bytes(b'[' * 100_000)
  elif changed == 'plan':
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {'subject_flops_per_token': 12.0}))
  else:
    plan.unlink()
    plan.mkdir()
  if changed in ('plan', 'folder'):
    with pytest.raises(UserError, match=r'journal-plan\.json is not the plan of a store'):
      open_writer(tmp_path)
  else:
    assert ('train', 1) in fill(open_writer(tmp_path))


def test_journal_of_an_early_version_goes_on(tmp_path, pristine):
  fill(open_writer(tmp_path), 3)
  for path in tmp_path.glob('journal-*.json'):
    record = schema.content(json.loads(path.read_text()))
    path.write_text(json.dumps(record | ({'schema': 1} if 'plan' in path.name else {})))
  writer = open_writer(tmp_path)
  assert len(fill(writer)) == 3
  assert writer.finish() == config.read_store_file(str(pristine))


@pytest.mark.parametrize('content', ['', '[]', '{"identity": 1', 'null', '\x00', '[' * 100_000])
def test_broken_store_file_is_refused(copy, content):
  (copy / 'store.json').write_text(content)
  with pytest.raises(UserError, match='not a store description'):
    store.verify(str(copy))


def test_places_without_a_driver_are_refused():
  with pytest.raises(UserError, match='local disk or gs://'):
    open_writer('s3://bucket/store')
  with pytest.raises(UserError, match='local disk or gs://'):
    store.verify('http://example.org/store')


def test_many_threads_read_what_one_reads(pristine):
  opened = store.Store(cell(pristine, **{'data.epochs': 3}))
  ranges = [(i, i + 37) for i in range(0, 120, 3)]
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    found = list(pool.map(lambda r: opened.rows(*r), ranges))
  for (start, stop), rows in zip(ranges, found, strict=True):
    np.testing.assert_array_equal(rows, expected(3)[start:stop])
