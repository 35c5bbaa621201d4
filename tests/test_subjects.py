"""The language model against published numbers, a slow reference of its own, and files that are not models."""

import dataclasses
import hashlib
import importlib.util
import os
import pathlib

import gguf
import hypothesis
import jax
import numpy as np
import pytest
import tokenizers
from hypothesis import strategies

from sae_jax import subjects
from sae_jax.errors import UserError
from sae_jax.subjects import llama, text, tokenizer
from sae_jax.subjects.files.gguf import GGUF
from sae_jax.subjects.layers import Rope
from sae_jax.subjects.site import Site, parse
from sae_jax.subjects.subject import Subject
from tests import toy_model

# Written for this check, so that no model was trained on it.
PROSE = """\
On the morning after the storm, the harbour was littered with broken crates and tangled rope, and the fishermen stood about in small groups, arguing over whose boat had drifted furthest. Marta had slept through most of it. She came down the hill with a thermos of coffee under one arm and her brother's old raincoat over her shoulders, and she did not stop until she reached the far end of the pier, where the lighthouse keeper's dog was barking at something in the water.

"It's only a buoy," said the keeper, without turning around. "He thinks it's a seal."

She laughed and sat down on an overturned bucket. The town council had promised to repair the sea wall before winter, but the money had gone to a new roundabout instead, and now there was a gap wide enough to drive a truck through. People were angry, although not angry enough to attend the meetings, which were held on Tuesday evenings in a room above the bakery and usually ended early because the heating did not work.

Engineers who study coastal erosion distinguish between two kinds of damage. The first is sudden: a single large wave removes material that took decades to accumulate. The second is slow, and for that reason it is more often ignored. Sand moves along a beach a few grains at a time, carried by currents that run parallel to the shore, and when a new structure interrupts that flow the beach on one side grows while the beach on the other side starves. By the time anyone notices, the cheapest remedies are no longer available.
"""
PROSE_SHA256 = '528a046476f62ddc7c1c7716b5107d5f409f1bed1aca6fef21ca85b7fe246113'

KINDS = ('resid_pre', 'z', 'attn_out', 'resid_mid', 'mlp_post', 'mlp_out', 'resid_post')
TOY = llama.Arch(
  d_model=12,
  n_layers=3,
  n_heads=6,
  n_kv_heads=2,
  d_head=2,
  d_ffn=7,
  vocabulary=11,
  context=32,
  rope=Rope(50.0, 2),
  norm_eps=1e-5,
)


@pytest.fixture(scope='module')
def model():
  return subjects.load('smollm2-135m')


@pytest.fixture(scope='module')
def prose_ids(model):
  assert hashlib.sha256(PROSE.encode()).hexdigest() == PROSE_SHA256
  return model.encode([PROSE])[0]


def toy_params(n_blocks: int = TOY.n_layers) -> dict:
  return toy_model.llama_params(TOY, 0, 0.5, n_blocks)


def toy(n_blocks: int = TOY.n_layers) -> Subject:
  return Subject(llama, TOY, toy_params(n_blocks), n_blocks, tokenizers.Tokenizer(tokenizers.models.BPE()), 0, {})


def random_ids(rows: int, tokens: int, seed: int = 1) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, TOY.vocabulary, (rows, tokens))


def reference(arch: llama.Arch, params: dict, ids_T, edits: dict | None = None) -> dict:
  """Every site of every block and the logits: one head and one position at a time, in float64."""
  p = jax.tree.map(lambda value: value.astype(np.float64), params)
  p |= p.pop('blocks')
  half, group = arch.d_head // 2, arch.n_heads // arch.n_kv_heads
  found = {}

  def norm(x, w):
    return x / np.sqrt((x * x).mean() + arch.norm_eps) * w

  def rotate(x, position):
    angle = position * arch.rope.base ** (-np.arange(half) / half)
    z = (x[:half] + 1j * x[half:]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag])

  def attention(qkv_TE, t):
    heads = [np.split(qkv_E, arch.n_heads + 2 * arch.n_kv_heads) for qkv_E in qkv_TE[: t + 1]]
    parts = []
    for h in range(arch.n_heads):
      kv = arch.n_heads + h // group
      keys = np.array([rotate(head[kv], s) for s, head in enumerate(heads)])
      values = np.array([head[kv + arch.n_kv_heads] for head in heads])
      weight = np.exp(keys @ rotate(heads[t][h], t) / np.sqrt(arch.d_head))
      parts.append(weight @ values / weight.sum())
    return np.concatenate(parts)

  def site(kind, layer, rows):
    found[kind, layer] = (edits or {}).get((kind, layer), np.array(rows))
    return found[kind, layer]

  x_TD = p['embedding'][ids_T]
  for i in range(arch.n_layers):
    x_TD = site('resid_pre', i, x_TD)
    qkv_TE = [norm(x, p['attention_norm'][i]) @ p['qkv'][i] for x in x_TD]
    z_TE = site('z', i, [attention(qkv_TE, t) for t in range(len(x_TD))])
    x_TD = site('resid_mid', i, x_TD + site('attn_out', i, z_TE @ p['attention_out'][i]))
    halves = [np.split(norm(x, p['ffn_norm'][i]) @ p['gate_up'][i], 2) for x in x_TD]
    post_TF = site('mlp_post', i, [gate / (1 + np.exp(-gate)) * up for gate, up in halves])
    x_TD = site('resid_post', i, x_TD + site('mlp_out', i, post_TF @ p['down'][i]))
  found['logits'] = np.array([norm(x, p['final_norm']) @ p['embedding'].T for x in x_TD])
  return found


def log_p(logits_TV: np.ndarray) -> np.ndarray:
  return np.asarray(jax.nn.log_softmax(logits_TV))


def nats(model, ids_BT: np.ndarray) -> np.ndarray:
  """Loss of every token of windows that open with the start token: [B, T]."""
  windows = np.concatenate([np.full((len(ids_BT), 1), model.start_token), ids_BT], axis=1)
  return -np.take_along_axis(log_p(model.logits(windows)[:, :-1]), ids_BT[..., None], axis=2)[..., 0]


@pytest.mark.parametrize('kind,layer', [*((kind, 2) for kind in KINDS), ('z', 0), ('resid_post', 0)])
def test_every_site_equals_a_slow_reference(kind, layer):
  ids_BT = random_ids(2, 5)
  got = toy().residual(ids_BT, f'{kind}.{layer}')
  want = np.array([reference(TOY, toy_params(), ids_T)[kind, layer] for ids_T in ids_BT])
  np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)
  assert got.shape[-1] == toy().width(f'{kind}.{layer}') and got.dtype == np.float32


def test_logits_equal_a_slow_reference():
  ids_BT = random_ids(2, 5)
  want = np.array([reference(TOY, toy_params(), ids_T)['logits'] for ids_T in ids_BT])
  np.testing.assert_allclose(toy().logits(ids_BT), want, rtol=1e-3, atol=1e-4)


def test_residual_is_causal():
  ids_BT = random_ids(1, 7)
  changed = ids_BT.copy()
  changed[0, 4] = (changed[0, 4] + 1) % TOY.vocabulary
  before, after = (np.asarray(toy().residual(ids, 'resid_post.2')) for ids in (ids_BT, changed))
  np.testing.assert_array_equal(before[0, :4], after[0, :4])
  assert (before[0, 4:] != after[0, 4:]).any(axis=-1).all()


def test_residual_at_a_position_ignores_what_rows_are_filled_up_with():
  ids_BT, last_B = random_ids(3, 6), np.array([0, 3, 5])
  got_BD = toy().residual_at(ids_BT, last_B, 'z.1')
  for row, last in enumerate(last_B):
    want_D = toy().residual(ids_BT[row : row + 1, : last + 1], 'z.1')[0, -1]
    np.testing.assert_allclose(got_BD[row], want_D, rtol=1e-5, atol=1e-6)


def test_residual_needs_only_the_blocks_before_the_site():
  ids_BT = np.arange(6).reshape(2, 3)
  for site in ('resid_post.1', 'mlp_out.1', 'resid_pre.2'):
    np.testing.assert_array_equal(toy(2).residual(ids_BT, site), toy().residual(ids_BT, site))
  with pytest.raises(ValueError, match=r'z\.2 needs 3 blocks and 2 were loaded'):
    toy(2).residual(ids_BT, 'z.2')
  for predict in (toy(2).logits, lambda ids_BT: toy(2).next_token(ids_BT, ids_BT, 'z.0')):
    with pytest.raises(ValueError, match='all 3 blocks'):
      predict(ids_BT)


@pytest.mark.parametrize('kind', KINDS)
def test_predictions_go_on_from_a_site_edited_or_as_it_was(kind):
  ids_BT, rng = random_ids(9, 32), np.random.default_rng(2)  # 279 tokens: more than go at once
  model, site = toy(), f'{kind}.1'
  own_BTD = np.asarray(model.residual(ids_BT, site))
  x_BTD = own_BTD + rng.standard_normal(own_BTD.shape).astype(np.float32)
  ce_BT, kl_BT = model.next_token(x_BTD, ids_BT, site)
  for row in (0, 8):
    edited, clean = (
      log_p(reference(TOY, toy_params(), ids_BT[row], edits)['logits'][:-1]) for edits in ({(kind, 1): x_BTD[row]}, {})
    )
    np.testing.assert_allclose(ce_BT[row], -edited[np.arange(31), ids_BT[row, 1:]], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(kl_BT[row], (np.exp(clean) * (clean - edited)).sum(axis=-1), rtol=1e-3, atol=1e-3)
  assert kl_BT.shape == (9, 31) and np.mean(kl_BT) > 0.1
  ce_BT, kl_BT = model.next_token(own_BTD, ids_BT, site)
  want = -np.take_along_axis(log_p(model.logits(ids_BT))[:, :-1], ids_BT[:, 1:, None], axis=2)[..., 0]
  np.testing.assert_allclose(ce_BT, want, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(kl_BT, 0, atol=1e-6)


def test_predictions_are_compared_with_the_reference_that_is_given():
  ids_BT, model = random_ids(9, 32), toy()
  x_BTD, last_BTD = 2 * model.residual(ids_BT, 'resid_mid.1'), model.residual(ids_BT, 'resid_post.2')
  own = model.next_token(x_BTD, ids_BT, 'resid_mid.1')
  jax.tree.map(np.testing.assert_array_equal, model.next_token(x_BTD, ids_BT, 'resid_mid.1', last_BTD), own)
  assert (model.next_token(x_BTD, ids_BT, 'resid_mid.1', 2 * last_BTD + x_BTD)[1] != own[1]).all()


@pytest.mark.parametrize('kind', KINDS)
def test_flops_count_every_multiply_add_of_a_window(kind):
  """Two whole blocks, and of the third what the site needs."""
  window, d, heads = 5, TOY.d_model, TOY.n_heads * TOY.d_head
  total = 0
  for t in range(window):
    attention = d * (TOY.n_heads + 2 * TOY.n_kv_heads) * TOY.d_head + TOY.n_heads * (t + 1) * TOY.d_head * 2
    parts = {'z': attention, 'attn_out': heads * d, 'resid_mid': 0, 'mlp_post': 2 * d * TOY.d_ffn}
    parts |= {'mlp_out': TOY.d_ffn * d, 'resid_post': 0}
    done = KINDS.index(kind)
    total += 2 * (2 * sum(parts.values()) + sum([0, *parts.values()][: done + 1]))
  assert toy().flops(f'{kind}.2', window) == pytest.approx(total / window)


def test_smollm2_predicts_unseen_prose(model, prose_ids):
  assert prose_ids[:12].tolist() == [3280, 260, 5738, 990, 260, 5670, 28, 260, 28899, 436, 1150, 4587]
  assert prose_ids[-4:].tolist() == [2848, 1770, 30, 198]
  assert len(prose_ids) == 322
  assert model.tokenizer.decode(prose_ids) == PROSE
  loss_T = nats(model, prose_ids[None])[0]
  # Half-split RoPE on the rows as GGUF stores them gives 5.567.
  assert loss_T.mean() == pytest.approx(3.3616, abs=0.002)
  np.testing.assert_allclose(loss_T[:5], [9.4195, 1.4826, 9.3822, 2.6780, 1.0431], atol=0.002)
  assert nats(model, np.random.default_rng(0).permutation(prose_ids)[None]).mean() > 7


def test_smollm2_ranks_the_next_token(model, prose_ids):
  logits_V = np.asarray(model.logits(np.concatenate([[0], prose_ids])[None])[0, -1])
  top = np.argsort(-logits_V)[:5]
  assert top.tolist() == [198, 504, 788, 6228, 5195]
  np.testing.assert_allclose(logits_V[top], [35.548, 30.060, 28.036, 27.835, 27.816], atol=0.02)


def test_smollm2_predicts_speeches(model):
  speeches = dict(text.load('sotu'))
  assert len(speeches) == 249
  names = ('1790-Washington-1.txt', '2024-Biden-1.txt')
  ids_BT = np.array([ids[:511] for ids in model.encode([speeches[name] for name in names])])
  np.testing.assert_allclose(nats(model, ids_BT).mean(axis=1), [3.4020, 3.0256], atol=0.003)


def test_smollm2_start_token_is_an_attention_sink(model, prose_ids):
  norm_T = np.linalg.norm(model.residual(np.concatenate([[0], prose_ids])[None], 'resid_post.12')[0], axis=-1)
  assert norm_T[0] == pytest.approx(20597, rel=1e-3)
  assert np.median(norm_T[1:]) == pytest.approx(140.2, rel=1e-3)
  assert norm_T[1:].max() == pytest.approx(181.6, rel=1e-3)


def test_smollm2_text_that_looks_like_a_control_token_is_text(model):
  ids = model.encode(['<|im_start|>x'])[0]
  assert 1 not in ids
  assert model.tokenizer.decode(ids) == '<|im_start|>x'


def test_smollm2_predicts_from_its_own_residual_stream(model, prose_ids):
  ids_BT = np.concatenate([[0], prose_ids[:64]])[None]
  ce_BT, kl_BT = model.next_token(model.residual(ids_BT, 'resid_post.12'), ids_BT, 'resid_post.12')
  np.testing.assert_allclose(ce_BT, nats(model, prose_ids[None, :64]), atol=1e-3)
  assert (kl_BT == 0).all()


def test_tokens_say_which_characters_they_cover(model):
  text = 'The café cost 42 €.'
  ((ids, spans),) = model.encode_with_offsets([text])
  assert ids.tolist() == model.encode([text])[0].tolist()
  whole = [text[a:b] for (a, b), i in zip(spans, ids, strict=True) if model.tokenizer.decode([i]) == text[a:b]]
  assert {'The', ' cost', '4', '2', '.'} <= set(whole)
  assert ''.join(text[a:b] for a, b in dict.fromkeys(map(tuple, spans))) == text
  assert model.encode_with_offsets([''])[0][1].shape == (0, 2)


@pytest.mark.parametrize('site', ['resid_post.30', 'resid_post.-1', 'resid_post.01', 'resid_post', 'head_out.3', ''])
def test_site_unknown_is_refused_with_what_is_allowed(site):
  with pytest.raises(UserError, match=r'use one of resid_pre, z, .*resid_post, a dot, and a layer from 0 to 29$'):
    parse(site, KINDS, 30)
  with pytest.raises(UserError, match='is not a site'):
    parse('resid_mid.3', ('resid_pre', 'resid_post'), 30)


@hypothesis.given(strategies.text(max_size=20), strategies.integers(1, 99))
@hypothesis.settings(max_examples=100, deadline=None)
def test_site_is_a_place_in_a_block_or_an_error(site, n_layers):
  try:
    found = parse(site, KINDS, n_layers)
    assert site == f'{found.kind}.{found.layer}'
  except UserError:
    assert site not in [f'{kind}.{i}' for kind in KINDS for i in range(n_layers)]


def test_site_of_every_block_is_accepted():
  assert [parse(f'{kind}.{i}', KINDS, 30) for kind in KINDS for i in range(30)] == [
    Site(kind, i) for kind in KINDS for i in range(30)
  ]


def test_names_unknown_are_refused():
  with pytest.raises(UserError, match=r"data.subject='gpt5'.*smollm2-135m"):
    subjects.load('gpt5')
  with pytest.raises(UserError, match=r"data.text='../etc'.*sotu"):
    text.load('../etc')


def test_packages_missing_name_the_remedy(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  for load in (lambda: subjects.load('smollm2-135m'), lambda: text.load('sotu')):
    with pytest.raises(UserError, match='make install'):
      load()


def test_text_hash_sees_names_and_borders():
  hashes = [text.sha256(d) for d in ([('a', 'bc')], [('ab', 'c')], [('a', 'b'), ('', 'c')], [('a', 'bd')])]
  assert len(set(hashes)) == 4


def test_folder_of_texts_holds_files(tmp_path):
  (tmp_path / 'a.txt').write_text('to be')
  assert text.load(str(tmp_path)) == [('a.txt', 'to be')]
  os.mkfifo(tmp_path / 'b.txt')
  with pytest.raises(UserError, match=r"holds 'b\.txt', which is not a file"):
    text.load(str(tmp_path))


def write_gguf(
  path,
  arch: llama.Arch,
  params: dict,
  skip: str = '',
  architecture: str = 'llama',
  pre='smollm',
  more=lambda writer: None,
) -> None:
  """A tiny float32 file, laid out as llama.cpp writes it. `more` adds fields."""
  writer = gguf.GGUFWriter(path, architecture)
  more(writer)
  writer.add_block_count(arch.n_layers)
  writer.add_context_length(arch.context)
  writer.add_embedding_length(arch.d_model)
  writer.add_feed_forward_length(arch.d_ffn)
  writer.add_head_count(arch.n_heads)
  writer.add_head_count_kv(arch.n_kv_heads)
  writer.add_rope_freq_base(arch.rope.base)
  writer.add_layer_norm_rms_eps(arch.norm_eps)
  writer.add_vocab_size(arch.vocabulary)
  writer.add_tokenizer_model('gpt2')
  writer.add_bos_token_id(5)
  writer.add_tokenizer_pre(pre)
  writer.add_token_list(['a', 'b', 'ab', '1', *(f'<{i}>' for i in range(arch.vocabulary - 4))])
  writer.add_token_merges(['a b'])

  def interleave(w_ED, heads):
    return w_ED.reshape(heads, 2, arch.d_head // 2, -1).swapaxes(1, 2).reshape(w_ED.shape)

  params = params | params['blocks']
  tensors = {'token_embd': params['embedding'], 'output_norm': params['final_norm']}
  n, kv = arch.n_heads * arch.d_head, arch.n_kv_heads * arch.d_head
  for i in range(arch.n_layers):
    q, k, v = np.split(params['qkv'][i].T, [n, n + kv])
    gate, up = np.split(params['gate_up'][i].T, 2)
    tensors |= {
      f'blk.{i}.attn_q': interleave(q, arch.n_heads),
      f'blk.{i}.attn_k': interleave(k, arch.n_kv_heads),
      f'blk.{i}.attn_v': v,
      f'blk.{i}.attn_output': params['attention_out'][i].T,
      f'blk.{i}.ffn_gate': gate,
      f'blk.{i}.ffn_up': up,
      f'blk.{i}.ffn_down': params['down'][i].T,
      f'blk.{i}.attn_norm': params['attention_norm'][i],
      f'blk.{i}.ffn_norm': params['ffn_norm'][i],
    }
  for name, value in tensors.items():
    if name != skip:
      writer.add_tensor(f'{name}.weight', np.ascontiguousarray(value))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


# Head width 4 has pairs to interleave.
WIDE = dataclasses.replace(TOY, d_model=24, d_head=4, rope=Rope(50.0, 4))


def wide_params() -> dict:
  return toy_model.llama_params(WIDE, 3, 1.0)


def test_gguf_round_trip_of_all_or_some_blocks(tmp_path):
  params = wide_params()
  write_gguf(tmp_path / 'm.gguf', WIDE, params)
  model = subjects.load(str(tmp_path))
  assert dataclasses.replace(model.arch, norm_eps=WIDE.norm_eps) == WIDE  # eps is stored in float32
  jax.tree.map(np.testing.assert_array_equal, model.params, params)
  assert model.encode(['ab11'])[0].tolist() == [2, 3, 3]
  assert (model.start_token, model.provenance['subject'], model.n_blocks) == (5, str(tmp_path), 3)
  some = subjects.load(str(tmp_path), 'resid_pre.2')
  np.testing.assert_array_equal(some.params['blocks']['qkv'], params['blocks']['qkv'][:2])


def test_gguf_that_is_not_a_whole_model_is_refused(tmp_path):
  (tmp_path / 'noise.gguf').write_bytes(b'\x80\x04not a model' * 50)
  with pytest.raises(UserError, match='not a readable GGUF'):
    subjects.load(str(tmp_path))
  write_gguf(tmp_path / 'noise.gguf', WIDE, wide_params(), architecture='mamba')
  with pytest.raises(UserError, match="architecture 'mamba' is not known"):
    subjects.load(str(tmp_path))
  write_gguf(tmp_path / 'noise.gguf', WIDE, wide_params(), skip='blk.1.ffn_up')
  with pytest.raises(UserError, match=r'no tensor model\.layers\.1\.mlp\.up_proj'):
    subjects.load(str(tmp_path), 'resid_post.1')
  write_gguf(tmp_path / 'noise.gguf', WIDE, wide_params(), pre='llama-bpe')
  with pytest.raises(UserError, match='llama-bpe'):
    subjects.load(str(tmp_path))
  with pytest.raises(UserError, match=r'has no field tokenizer\.ggml\.none'):
    GGUF(tmp_path / 'noise.gguf').field('tokenizer.ggml.none')
  (tmp_path / 'more.gguf').write_bytes(b'')
  with pytest.raises(UserError, match='or with one GGUF file'):
    subjects.load(str(tmp_path))


def linear(writer: gguf.GGUFWriter) -> None:
  writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
  writer.add_rope_scaling_factor(8.0)


def test_gguf_fields_are_understood_or_refused(tmp_path):
  file = tmp_path / 'm.gguf'
  write_gguf(file, WIDE, wide_params(), more=linear)
  assert subjects.load(str(tmp_path), 'resid_pre.0').arch.rope == Rope(50.0, 4, 8.0)
  for more, says in (
    (lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN), 'yarn'),
    (lambda writer: writer.add_logit_scale(2.0), r"'llama\.logit_scale'='2\.0' is not understood"),
    (
      lambda writer: (writer.add_key_length(4), writer.add_rope_dimension_count(2)),
      r"rope\.dimension_count'='2' is not",
    ),
  ):
    write_gguf(file, WIDE, wide_params(), more=more)
    with pytest.raises(UserError, match=says):
      subjects.load(str(tmp_path), 'resid_pre.0')


def test_gguf_with_a_broken_tokenizer_is_refused(tmp_path):
  file = tmp_path / 'm.gguf'
  write_gguf(file, WIDE, wide_params())
  whole = file.read_bytes()
  for old, new, says in ((b'a b', b'a z', 'no sound tokenizer'), (b'smollm', b'sm\xffllm', 'cannot be read')):
    file.write_bytes(whole.replace(old, new))
    with pytest.raises(UserError, match=says):
      subjects.load(str(tmp_path), 'resid_pre.0')


def test_sentencepieces_that_put_a_space_before_a_text_are_refused():
  fields = {'tokenizer.ggml.model': 'llama', 'tokenizer.ggml.pre': 'default', 'tokenizer.ggml.add_space_prefix': True}
  with pytest.raises(UserError, match='add_space_prefix=True'):
    tokenizer.of_gguf(fields.__getitem__, pathlib.Path('m.gguf'))
