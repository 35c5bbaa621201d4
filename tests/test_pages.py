"""The pages of latents: what they show is what was measured, text is never markup, and they work in a browser."""

import json
import pathlib
import re
import shutil
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import files, pages, subjects
from sae_jax.latent_pages import contexts, effects, graph, words, write
from sae_jax.measures import names, results, run
from sae_jax.measures.latents import Latents
from sae_jax.subjects import text
from tests import judging, measured
from tests.test_harvest import toy_subject, toy_text
from tests.test_page import Read

# Markup, quotes, what a template would run, what ends a script, directions, whitespace, controls, half a character.
HOSTILE = ['</script><script>alert(1)</script>', '"><img src=x onerror=alert(1)>', "' onmouseover='x", '{{ 7 * 7 }}']
HOSTILE += ['\u202eevil', ' \n\t', '\0\x1b', '\u2028', '\ufffd', '<!--', ' the', '&lt;', '\u0301', 'x' * 300, '   ']
FLAGS = ['--windows=11', '--train_windows=9']


class Decoding:
  """A tokenizer that makes other texts of ids."""

  decoder = 'some'

  def __init__(self, genuine, texts):
    self._genuine, self._texts = genuine, texts

  def __getattr__(self, name):
    return getattr(self._genuine, name)

  def decode(self, ids, skip_special_tokens=True):
    return ''.join(self._texts[i % len(self._texts)] for i in ids)


def use(patch, texts):
  """The toy model, whose tokens have these texts."""

  patch.setattr(subjects, 'load', toy_subject)
  patch.setattr(text, 'load', toy_text)
  if texts is not None:
    patch.setattr(write, 'Words', lambda tokenizer: words.Words(Decoding(tokenizer, texts)))


def shared(folder):
  return run.inputs_of(run.target(str(folder)), measured.SCOPE, run.inputs_folder(str(folder)))


def plant(folder, explained=(3, 5, 9), settings=None, **changes):
  """A result of n2g: two latents with patterns, and one with an empty trie."""
  of, on = run.target(str(folder)), shared(folder)
  key = results.Key('n2g', 1, settings or {}, of.tensors, of.weights, on.identity)
  arrays = {
    'latent_E': np.array(explained, np.int32),
    'firings_E': np.array([40, 50, 60]),
    'first_E1': np.array([0, 4, 6, 6]),
    # 1 after ANY after 2; 1 after START; 3 after 4
    'token_N': np.array([1, -1, 2, -2, 3, 4], np.int32),
    'parent_N': np.array([-1, 0, 1, 0, -1, 4], np.int32),
    'value_N': np.array([np.nan, np.nan, 0.5, 0.75, np.nan, 0.2], np.float32),
    'true_E': np.array([16, 5, 0]),
    'predicted_E': np.array([4, 0, 0]),
    'hits_E': np.array([2, 0, 0]),
  } | changes
  lines = results.Lines(of.folder, key)
  lines.add({'tokens_of_examples': 7})  # what makes the bank has no arrays
  lines.add({'explained': 3} | run._saved(of, 'n2g', 1, arrays))
  results.write(of.folder, of.id, results.read(of.folder, of.id) | {'n2g': results.Result(key, {})})
  return arrays


def pages_of(folder, out, *flags):
  with pytest.raises(SystemExit) as code:
    pages.main([f'--cell={folder}', f'--out={out}', *FLAGS, *flags])
  assert not code.value.code, code.value.code


@pytest.fixture(scope='module')
def cell(tmp_path_factory):
  """A cell with its measures taken."""
  folder = tmp_path_factory.mktemp('pages') / 'cell'
  with pytest.MonkeyPatch.context() as patch:
    use(patch, None)
    measured.finished(folder, measured.cell())
    on = shared(folder)
    assert run.run(run.target(str(folder)), [Latents(contexts=4)], on, None)
    plant(folder)
  return folder


@pytest.fixture
def toy(monkeypatch):
  use(monkeypatch, None)


@pytest.fixture(scope='module')
def sites(cell, tmp_path_factory):
  """The pages of hostile tokens, and of harmless ones that are shaped alike."""
  made = {}
  for name, texts in (('hostile', HOSTILE), ('harmless', [f'w{i}' for i in range(len(HOSTILE))])):
    made[name] = tmp_path_factory.mktemp(name)
    with pytest.MonkeyPatch.context() as patch:
      use(patch, texts)
      pages_of(cell, made[name])
  return made


def test_text_never_becomes_markup(sites):
  paths = sorted(path.relative_to(sites['hostile']) for path in sites['hostile'].rglob('*.html'))
  assert len(paths) == 1 + measured.F
  seen = ''
  for path in paths:
    hostile, harmless = (Read((sites[name] / path).read_text()) for name in ('hostile', 'harmless'))
    # Runs of text may fall together otherwise; the kinds of elements and their attributes may not.
    assert set(hostile.elements) <= set(harmless.elements) | {('i', 'class', 'title')}, path
    seen += ''.join(hostile.texts)
    raw = (sites['hostile'] / path).read_text()
    assert not set(raw) & set('\0\x1b\u202e\u2028') and '<img' not in raw and '<!--' not in raw
    assert raw.count('<script') == (2 if path.name == 'index.html' else 0)
    assert re.findall(r'(?:src|href)="(?!(?:\.\./)?(?:index|\d\d)\.html")[^"]*"', raw) == []
    assert 'http://' not in raw and 'https://' not in raw
  for shown in (*HOSTILE[:4], '⟨U+202E⟩evil', '␣↵⇥', '␀␛', '⟨U+2028⟩', '◌\u0301', '␣the', '␣␣␣'):
    assert shown in seen, shown


def test_a_vocabulary_is_shown_by_signs():
  of = words.Words(Decoding(toy_subject('').tokenizer, HOSTILE))
  assert of.chip(10) == '␣the' and of.plain(10) == ' the' and of.chip(14) == '␣␣␣'
  assert words.Words(None).chip(7) == '⟨7⟩'
  assert words.visible('a\u200fb\x7f\xa0') == 'a⟨U+200F⟩b⟨U+007F⟩⟨U+00A0⟩'
  assert words.visible('\ufe0f\u3164') == '⟨U+FE0F⟩⟨U+3164⟩'  # a selector of variants, a filler
  assert words.visible('\u0489') == '◌\u0489'  # encloses what stands before it


def test_pages_show_the_numbers_that_were_measured(cell, toy, tmp_path):
  pages_of(cell, tmp_path, '--ablate=0', '--latents=0,3-5,9')
  assert {path.name for path in tmp_path.rglob('*.html')} == {*(f'0{f}.html' for f in (0, 3, 4, 5, 9)), 'index.html'}
  three, four, nine = ((tmp_path / 'latents' / f'0{f}.html').read_text() for f in (3, 4, 9))
  arrays = run.finished(run.target(str(cell)), 'latents', shared(cell)).units[0].arrays
  assert f'{arrays["firings"][3]:,} of {20 * 7:,}' in three
  assert f'n = {measured.F}, L0 = {arrays["firings"].sum() / (20 * 7):.3g}, on' in three
  assert '&#39;a&#39; after START' in three and '&#39;a&#39; after ANY after &#39;b&#39;' in three
  assert three.index('after START') < three.index('after ANY')  # the larger activation first
  assert '<dd>0.50</dd>' in three and '<dd>0.12</dd>' in three and '<dd>0.20</dd>' in three
  assert 'it is active:\n16; that the patterns name: 4; both: 2.' in three
  assert 'largest activation' not in three + four and 'predicted activations' in three
  assert 'active too seldom' in four and 'no pattern was found' in nine and 'not\nmeasured' in four
  rows = json.loads(re.search(r'id="data">(.*?)</script>', (tmp_path / 'index.html').read_text())[1])['rows']
  assert [row[0] for row in rows] == [0, 3, 4, 5, 9]
  assert rows[1][3:5] == [0.5, 0.12] and rows[1][6] == "'a' after START; 'a' after ANY after 'b'"
  assert rows[3][3:5] == [None, 0.0]
  assert rows[0][1] == 0 and 'active on none' in (tmp_path / 'latents' / '00.html').read_text()


def test_by_the_original_rule_numbers_are_called_shares_of_the_largest_activation(cell, toy, tmp_path):
  copy = shutil.copytree(cell, tmp_path / 'cell')
  plant(copy, settings={'rule': 'original'})
  pages_of(copy, tmp_path / 'out', '--ablate=0', '--latents=3-4')
  index, three, four = (
    (tmp_path / 'out' / name).read_text() for name in ('index.html', 'latents/03.html', 'latents/04.html')
  )
  assert 'the share of its largest activation in the\ntraining text that each predicts' in three
  assert 'where it reaches half of that:\n16; that the patterns name: 4' in three and 'where it is active:' not in three
  assert 'predicted shares of its largest activation' in three and 'none of its examples reaches half' in four
  assert 'precision, recall: of where it reaches half' in index


def test_without_n2g_pages_say_so(tmp_path, toy):
  folder = tmp_path / 'cell'
  measured.finished(folder, measured.cell())
  assert run.run(run.target(str(folder)), [Latents(contexts=2)], shared(folder), None)
  pages_of(folder, tmp_path / 'out', '--ablate=0', '--latents=3')
  for path in (tmp_path / 'out').rglob('*.html'):
    assert 'the measure n2g was not taken of this autoencoder' in path.read_text()


def test_a_latent_of_no_sum_is_not_taken_away(tmp_path, toy):
  folder = tmp_path / 'cell'
  measured.finished(folder, measured.of_family('cs294a'))
  assert run.run(run.target(str(folder)), [Latents(contexts=2)], shared(folder), None)
  pages_of(folder, tmp_path / 'out', '--ablate=2', '--latents=3')
  (page,) = (tmp_path / 'out' / 'latents').iterdir()
  assert 'not\nmeasured by taking it away' in page.read_text() and 'Measured, by' not in page.read_text()


def test_contexts_have_every_activation_of_the_latent(tmp_path):
  on = judging.inputs(tmp_path)
  of = judging.judged('topk')
  (unit,) = judging.units(Latents(contexts=4), of, on)
  some = contexts.places(unit.arrays, 'top', np.arange(16), 4)
  found = contexts.around(some, of, on)
  np.testing.assert_allclose(found.value_RW[:, contexts.MIDDLE], some.value_R, rtol=1e-5)
  assert len(some.latent_R) > 20
  ids_SWT, z_SWTF = [], []
  for stream in ('train', 'held_out'):
    blocks = [on.block(stream, i) for i in range(on.blocks(stream))]
    x_WTD = np.concatenate([block.x_WTD for block in blocks])
    z_BK, idx_BK, _ = of.form.codes(of.params, of.form.unit(jnp.asarray(x_WTD.reshape(-1, 6)))[0]).listed()
    z_BF = np.zeros((len(z_BK), 16), np.float32)
    np.put_along_axis(z_BF, np.asarray(idx_BK), np.asarray(z_BK), axis=1)
    z_SWTF.append(z_BF.reshape(len(x_WTD), -1, 16))
    z_SWTF[-1][:, 0] = 0  # the start token does not count
    ids_SWT.append(np.concatenate([block.windows.ids_WT for block in blocks]))
  for r, latent in enumerate(some.latent_R):
    ids_T = ids_SWT[some.held_out_R[r]][some.window_R[r]]
    z_T = z_SWTF[some.held_out_R[r]][some.window_R[r], :, latent]
    at_W = some.position_R[r] + np.arange(found.id_RW.shape[1]) - contexts.MIDDLE
    inside_W = (at_W >= 0) & (at_W < len(ids_T))
    np.testing.assert_array_equal(found.id_RW[r], np.where(inside_W, ids_T[np.clip(at_W, 0, 7)], -1))
    np.testing.assert_allclose(found.value_RW[r][inside_W], z_T[at_W[inside_W]], rtol=1e-5, atol=1e-7)


def test_effects_are_those_of_whole_windows_and_of_the_bare_row(tmp_path):
  on, of = judging.inputs(tmp_path), judging.judged('topk')
  (unit,) = judging.units(Latents(contexts=4), of, on)
  subject, latents = on.subject, np.flatnonzero(unit.arrays['firings'] > 1)[[0, 2, 3]]
  some = contexts.places(unit.arrays, 'top', latents, 2)
  said = []
  found, row = effects.ablated(some, of, on, latents, said.append), effects.direct(of, on, latents)
  assert said[-1] == len(some.latent_R) > 3
  w_FD = np.asarray(of.params['w_dec_FD'])
  for g, latent in enumerate(latents):
    changes = []
    for r in np.flatnonzero(some.latent_R == latent):
      x_TD, _ = effects._window(on, 'held_out' if some.held_out_R[r] else 'train', some.window_R[r])
      at = some.position_R[r]
      norm = np.linalg.norm(x_TD[at] - x_TD[at].mean())
      removed_TD = x_TD.copy()
      removed_TD[at] -= some.value_R[r] * norm * w_FD[latent]
      cache = subject.prefix(jnp.asarray(x_TD[None]), on.site)
      clean_V, without_V = (
        np.asarray(subject.logits_from(cache, jnp.asarray(x[None]), on.site, 0))[0, at] for x in (x_TD, removed_TD)
      )
      changes.append(clean_V - without_V)
    change_V = np.mean(changes, axis=0)
    check(found, g, change_V - change_V.mean())
    bare_V = np.asarray(subject.family.unembed(subject.arch, subject.params, jnp.asarray(w_FD[latent])[None, None]))[
      0, 0
    ]
    check(row, g, bare_V - bare_V.mean())
  inside = judging.inputs(tmp_path)
  inside.site = 'mlp_post.1'
  assert effects.direct(of, inside, latents) is None


def check(found, g, wanted_V):
  np.testing.assert_allclose(found.up_value_GN[g], -np.sort(-wanted_V)[:10], rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(found.down_value_GN[g], np.sort(wanted_V)[:10], rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(wanted_V[found.up_GN[g]], found.up_value_GN[g], rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(wanted_V[found.down_GN[g]], found.down_value_GN[g], rtol=1e-3, atol=1e-4)


def test_patterns_that_no_walk_reaches_are_not_shown(cell, toy):
  """The first value on the way ends a walk, but for the original rule."""
  (unit,) = (unit for unit in run.finished(run.target(str(cell)), 'n2g', shared(cell)).units if unit.arrays)
  # Below 1 after ANY stands 2, and below that nothing new.
  value_N = np.array([np.nan, 0.25, 0.5, 0.75, np.nan, 0.2], np.float32)
  units = [unit._replace(arrays=dict(unit.arrays) | {'value_N': value_N})]
  assert graph.tries(units)[3].leaves() == [3, 1] and graph.tries(units, deepest=True)[3].leaves() == [3, 2, 1]
  value_N[0] = 0.1
  assert graph.tries(units)[3].leaves() == [0]
  assert value_N[2] == 0.5  # what was measured stays as it was


def test_a_trie_is_read_from_the_last_token_and_drawn_leftwards(cell, toy):
  units = run.finished(run.target(str(cell)), 'n2g', shared(cell)).units
  made = graph.tries(units)
  assert sorted(made) == [3, 5, 9] and made[9].leaves() == []
  assert made[5].parent_N.tolist() == [-1, 0] and made[5].scores == {'precision': None, 'recall': 0.0, 'f1': 0.0}
  said = words.Words(toy_subject('').tokenizer)
  assert [graph.sentence(made[3], leaf, said) for leaf in made[3].leaves()] == [
    "'a' after START",
    "'a' after ANY after 'b'",
  ]
  picture = graph.drawn(made[3], said)
  at = {node['text']: node for node in picture['nodes']}
  assert at['a']['x'] > at['any']['x'] > at['b']['x'] and at['start']['value'] == '0.75' and at['a']['value'] == ''
  assert {at[name]['kind'] for name in 'ab'} == {'token'} and at['any']['kind'] == 'any'
  assert len(picture['edges']) == 3 and all(edge['x1'] < edge['x2'] for edge in picture['edges'])
  assert all(0 < n['x'] and n['x'] + n['w'] <= picture['width'] for n in picture['nodes'])
  assert all(n['y'] + 20 <= picture['height'] for n in picture['nodes'])
  assert graph.drawn(made[9], said)['nodes'] == []
  many = graph.Trie(np.arange(100), np.full(100, -1), np.linspace(0, 1, 100, dtype=np.float32), {}, 0, 0, 0)
  line = graph.summary(many, words.Words(None))
  shown = line.split('; ')
  assert len(line) < 110 and shown[-1] == f'and {100 - (len(shown) - 1)} more' and shown[0] == "'⟨99⟩'"
  assert (
    graph.summary(made[3], said) == "'a' after START; 'a' after ANY after 'b'" and graph.summary(made[9], said) == ''
  )
  drawn = graph.drawn(many, words.Words(None))
  assert (drawn['shown'], drawn['total'], len(drawn['nodes'])) == (24, 100, 24)


def test_nearest_are_the_largest_cosines():
  w_FD = np.random.default_rng(0).standard_normal((40, 5)).astype(np.float32)
  some = np.array([0, 7, 39])
  found_GN, cosine_GN = write.nearest(w_FD, some)
  cosine_FF = np.corrcoef(w_FD) * 0 + (w_FD @ w_FD.T) / np.outer(*[np.linalg.norm(w_FD, axis=1)] * 2)
  for g, f in enumerate(some):
    others = [i for i in np.argsort(-cosine_FF[f]) if i != f][:8]
    assert found_GN[g].tolist() == others
    np.testing.assert_allclose(cosine_GN[g], cosine_FF[f, others], rtol=1e-5)
  assert write.nearest(w_FD[:1], np.array([0]))[0].shape == (1, 0)


def test_killed_it_leaves_whole_pages_and_goes_on_with_the_others(cell, toy, tmp_path, monkeypatch, capsys):
  flags = '--ablate=0', '--latents=0-6'
  pages_of(cell, tmp_path / 'whole', *flags)
  genuine, left = files.replace, {'writes': 3}

  def killing(path, data, **named):
    if left['writes'] == 0:
      raise KeyboardInterrupt
    left['writes'] -= 1
    genuine(path, data, **named)

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(files, 'replace', killing)
    pages_of(cell, tmp_path / 'broken', *flags)
  there = {path.name: path.stat().st_mtime_ns for path in (tmp_path / 'broken').rglob('*.html')}
  assert sorted(there) == ['00.html', '01.html', '02.html']
  capsys.readouterr()
  pages_of(cell, tmp_path / 'broken', *flags, '--dry_run')
  assert '4 of 7 pages to write' in capsys.readouterr().out
  pages_of(cell, tmp_path / 'broken', *flags)
  assert '4 pages written, 3 kept' in capsys.readouterr().out
  tree = [{p.name: p.read_bytes() for p in (tmp_path / one).rglob('*.html')} for one in ('whole', 'broken')]
  assert tree[0] == tree[1]
  assert {name: (tmp_path / 'broken/latents' / name).stat().st_mtime_ns for name in there} == there
  # Other links: none is kept. What earlier runs wrote goes, here too of an autoencoder with more latents, and nothing else.
  folder, own = tmp_path / 'broken/latents', ['31.html', '6.html.html', 'mine-06.html', 'notes.txt']
  page = (folder / '06.html').read_text()
  for name, text_of in zip(['0009.html', *own], [page, 'mine', page, page, page], strict=True):
    (folder / name).write_text(text_of)
  capsys.readouterr()
  pages_of(cell, tmp_path / 'broken', '--ablate=0', '--latents=0-5', '--dry_run')
  assert '6 of 6 pages to write' in (said := capsys.readouterr().out) and ', 2 of earlier runs to remove;' in said
  pages_of(cell, tmp_path / 'broken', '--ablate=0', '--latents=0-5')
  assert '6 pages written, 0 kept, 2 of earlier runs removed' in capsys.readouterr().out
  assert sorted(path.name for path in folder.iterdir()) == sorted([*(f'0{f}.html' for f in range(6)), *own])


REFUSED = {
  '--latents=3-': '--latents=3- is not a list of numbers and ranges',
  '--latents=1,32': '--latents=1,32: 32 is not within the latents 0 to 31',
  '--latents=5-3': '5-3 is not within',
  '--windows=10': (
    'latents of {id} is of other windows; give --windows and --train_windows as they were; or take it again: '
    '{again} --windows=10 --train_windows=9\n'
  ),
  '--weights=raw': 'latents of {id} is of the ema weights; give --weights=ema; or take it again: {again} --weights=raw {n}',
}


@pytest.mark.parametrize('flag', REFUSED)
def test_what_cannot_be_shown_is_refused_in_one_line(cell, toy, tmp_path, capsys, flag):
  with pytest.raises(SystemExit) as code:
    pages.main([f'--cell={cell}', f'--out={tmp_path}', *FLAGS, flag])
  error = capsys.readouterr().err
  assert code.value.code == 2 and error.count('\n') == 1, error
  again = f'python -m sae_jax.measure --cell={cell} --measures=latents'
  said = REFUSED[flag].format(id=measured.cell().id, again=again, n=' '.join(FLAGS))
  assert said in error and not list(tmp_path.iterdir())


def test_missing_stale_and_broken_measures_are_refused(tmp_path, toy, capsys, monkeypatch):
  folder = tmp_path / 'cell'
  measured.finished(folder, measured.cell())

  def error():
    with pytest.raises(SystemExit) as code:
      pages.main([f'--cell={folder}', f'--out={tmp_path / "out"}', *FLAGS])
    said = capsys.readouterr().err
    assert code.value.code == 2 and said.count('\n') == 1 and not (tmp_path / 'out').exists()
    return said

  assert f'python -m sae_jax.measure --cell={folder} --measures=latents' in error()
  assert run.run(run.target(str(folder)), [Latents(contexts=2)], shared(folder), None)
  plant(folder)
  with monkeypatch.context() as patch:
    patch.setitem(names.VERSIONS, 'n2g', 2)
    assert 'n2g of' in error() and error().count('version 1 of the measure, which now has 2') == 1
  path = folder / 'measures' / 'n2g.1.safetensors'
  data = path.read_bytes()
  path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
  assert 'does not fit its digest' in error()
  path.unlink()
  assert 'cannot be believed' in error()
  # A digest that fits does not make a table of it: a node that hangs from itself would be walked for ever.
  for broken in (
    {'parent_N': np.arange(6, dtype=np.int32)},
    {'first_E1': np.zeros(0, np.int64)},
    {'true_E': np.zeros(1)},
  ):
    (folder / 'measures' / 'n2g.jsonl').unlink()
    plant(folder, **broken)
    assert f'n2g of {measured.cell().id} cannot be believed' in error()
  measured.finished(folder, measured.cell(), seed=5)
  assert f'latents of {measured.cell().id} is of an autoencoder that was replaced since' in error()


def browse(page: pathlib.Path, folder: pathlib.Path, script: str, width: int = 1000) -> dict:
  """Runs JavaScript at the end of a page; what it puts into the object `seen`."""
  chromium = shutil.which('chromium') or shutil.which('chromium-browser')
  if chromium is None:
    pytest.skip('no chromium')
  act = f"""<pre id="seen" hidden></pre><script>
    const seen = {{}};
    const key = (key, on) => (on || document.activeElement).dispatchEvent(
      new KeyboardEvent('keydown', {{ key, bubbles: true, cancelable: true }}));
    {script}
    document.getElementById('seen').textContent = JSON.stringify(seen);
  </script></body>"""
  path = page.with_name(f'acted_{page.name}')
  path.write_text(page.read_text().replace('</body>', act))
  flags = 'headless no-sandbox disable-gpu no-first-run disable-background-networking disable-component-update'
  flags += f' disable-sync virtual-time-budget=3000 dump-dom window-size={width},800'
  command = [chromium, *(f'--{flag}' for flag in flags.split()), f'--user-data-dir={folder / "profile"}']
  dom = subprocess.run([*command, f'file://{path}'], capture_output=True, text=True, check=True).stdout
  path.unlink()
  return json.loads(re.search(r'<pre id="seen" hidden="">(.*?)</pre>', dom).group(1))


def test_the_list_is_searched_sorted_and_walked_by_keys_in_a_browser(sites, tmp_path):
  seen = browse(
    sites['hostile'] / 'index.html',
    tmp_path,
    """
    const ids = () => Array.from(body.rows, row => row.cells[0].textContent);
    const head = name => heads.find(head => head.textContent === name);
    const type = text => { box.value = text; box.dispatchEvent(new Event('input')); };
    seen.all = ids().length; seen.images = document.images.length; seen.scripts = document.scripts.length;
    head('max').querySelector('button').click(); seen.max = Array.from(body.rows, row => Number(row.cells[2].textContent));
    seen.aria = head('max').getAttribute('aria-sort');
    head('precision').querySelector('button').click(); seen.precision = ids().slice(0, 2);
    head('latent').querySelector('button').click(); seen.first = ids()[0];
    key('/', document.body); seen.focus = document.activeElement.id;
    type('IMG AFTER'); seen.found = ids(); seen.count = document.getElementById('count').textContent;
    let went = ''; document.addEventListener('click', event => { went = event.target.getAttribute('href'); event.preventDefault(); });
    key('Enter'); seen.enter = went;
    type(''); key('ArrowDown'); key('ArrowDown'); seen.down = document.activeElement.textContent;
    key('ArrowUp'); key('ArrowUp'); seen.up = document.activeElement.id;
    type('"><img'); seen.markup = ids().length;
    """,
  )
  assert seen['all'] == measured.F and seen['images'] == 0 and seen['scripts'] == 3  # two and that of this test
  assert seen['max'] == sorted(seen['max'], reverse=True) and seen['aria'] == 'descending'
  assert seen['precision'] == ['3', '0'] and seen['first'] == '0'  # what has none comes last
  assert seen['focus'] == 'search' and seen['found'] == ['3'] and seen['count'] == f'1 of {measured.F}'
  assert seen['enter'] == 'latents/03.html' and seen['down'] == '1' and seen['up'] == 'search'
  assert seen['markup'] > 0


def test_pages_fit_a_narrow_screen(sites, tmp_path):
  script = """
    seen.right = Math.max(...Array.from(document.querySelectorAll('body *'))
      .filter(e => !e.closest('.scroll') || e.classList.contains('scroll')).map(e => e.getBoundingClientRect().right));
    seen.images = document.images.length;
    const ends = Array.from(document.querySelectorAll('.graph, .graph svg'), e => e.getBoundingClientRect());
    seen.graph = ends.map(end => [Math.round(end.width), Math.round(end.right)]);
    seen.keys = Array.from(document.querySelectorAll('.scroll')).every(part => part.tabIndex === 0);
  """
  for name in ('index.html', 'latents/03.html'):
    page = sites['hostile'] / name
    narrow = page.with_name('narrow.html')
    # The window of a browser has a least width, which a body may go below.
    narrow.write_text(page.read_text().replace('<body>', '<body style="width: 360px; margin: 0">'))
    seen = browse(narrow, tmp_path, script, width=500)
    narrow.unlink()
    assert 300 < seen['right'] <= 400 and seen['images'] == 0 and seen['keys'], (name, seen)
  (room, right), (width, end) = seen['graph']
  assert width > room and end == right  # where the latent is active is seen without scrolling
