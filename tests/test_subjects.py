"""The language model against published numbers, a slow reference of its own, and files that are not models."""

import dataclasses
import hashlib
import importlib.util

import gguf
import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies

from sae_jax import subjects
from sae_jax.errors import UserError
from sae_jax.subjects import gguf_llama, llama, smollm2, text
from sae_jax.subjects.subject import layer_of

# Written for this check, so that no model was trained on it.
PROSE = """\
On the morning after the storm, the harbour was littered with broken crates and tangled rope, and the fishermen stood about in small groups, arguing over whose boat had drifted furthest. Marta had slept through most of it. She came down the hill with a thermos of coffee under one arm and her brother's old raincoat over her shoulders, and she did not stop until she reached the far end of the pier, where the lighthouse keeper's dog was barking at something in the water.

"It's only a buoy," said the keeper, without turning around. "He thinks it's a seal."

She laughed and sat down on an overturned bucket. The town council had promised to repair the sea wall before winter, but the money had gone to a new roundabout instead, and now there was a gap wide enough to drive a truck through. People were angry, although not angry enough to attend the meetings, which were held on Tuesday evenings in a room above the bakery and usually ended early because the heating did not work.

Engineers who study coastal erosion distinguish between two kinds of damage. The first is sudden: a single large wave removes material that took decades to accumulate. The second is slow, and for that reason it is more often ignored. Sand moves along a beach a few grains at a time, carried by currents that run parallel to the shore, and when a new structure interrupts that flow the beach on one side grows while the beach on the other side starves. By the time anyone notices, the cheapest remedies are no longer available.
"""
PROSE_SHA256 = '528a046476f62ddc7c1c7716b5107d5f409f1bed1aca6fef21ca85b7fe246113'

TOY = llama.Arch(
  d_model=12,
  n_layers=3,
  n_heads=6,
  n_kv_heads=2,
  d_head=2,
  d_ffn=7,
  vocabulary=11,
  context=32,
  rope_base=50.0,
  norm_eps=1e-5,
)


@pytest.fixture(scope='module')
def model():
  return subjects.load('smollm2-135m')


@pytest.fixture(scope='module')
def prose_ids(model):
  assert hashlib.sha256(PROSE.encode()).hexdigest() == PROSE_SHA256
  return model.encode([PROSE])[0]


def toy_params(n_layers: int = TOY.n_layers) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  shapes = llama.parameter_shapes(TOY, n_layers)
  return {key: rng.standard_normal(shape).astype(np.float32) * 0.5 for key, shape in shapes.items()}


def reference_residual(arch: llama.Arch, params: dict, ids_T, layer: int) -> np.ndarray:
  """One head and one position at a time, in float64."""
  p = {key: value.astype(np.float64) for key, value in params.items()}
  norm = lambda x, w: x / np.sqrt((x * x).mean() + arch.norm_eps) * w  # noqa: E731
  half, group = arch.d_head // 2, arch.n_heads // arch.n_kv_heads

  def rotate(x, position):
    angle = position * arch.rope_base ** (-np.arange(half) / half)
    z = (x[:half] + 1j * x[half:]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag])

  x_TD = p['embedding'][ids_T]
  for i in range(layer + 1):
    heads = [np.split(norm(x, p['attention_norm'][i]) @ p['qkv'][i], arch.n_heads + 2 * arch.n_kv_heads) for x in x_TD]
    out_TD = []
    for t, x in enumerate(x_TD):
      parts = []
      for h in range(arch.n_heads):
        kv = arch.n_heads + h // group
        keys = np.array([rotate(heads[s][kv], s) for s in range(t + 1)])
        values = np.array([heads[s][kv + arch.n_kv_heads] for s in range(t + 1)])
        weight = np.exp(keys @ rotate(heads[t][h], t) / np.sqrt(arch.d_head))
        parts.append(weight @ values / weight.sum())
      x = x + np.concatenate(parts) @ p['attention_out'][i]
      gate, up = np.split(norm(x, p['ffn_norm'][i]) @ p['gate_up'][i], 2)
      out_TD.append(x + (gate / (1 + np.exp(-gate)) * up) @ p['down'][i])
    x_TD = np.array(out_TD)
  return x_TD


def nats(model, ids_BT: np.ndarray) -> np.ndarray:
  """Loss of every token of windows that open with the start token: [B, T]."""
  windows = np.concatenate([np.full((len(ids_BT), 1), model.start_token), ids_BT], axis=1)
  log_p = np.asarray(jax.nn.log_softmax(model.logits(windows)[:, :-1]))
  return -np.take_along_axis(log_p, ids_BT[..., None], axis=2)[..., 0]


@pytest.mark.parametrize('layer', [0, 2])
def test_residual_equals_slow_reference(layer):
  params = toy_params()
  ids_BT = np.random.default_rng(1).integers(0, TOY.vocabulary, (2, 5))
  got = llama.residual(TOY, params, ids_BT, layer)
  want = np.array([reference_residual(TOY, params, ids_T, layer) for ids_T in ids_BT])
  np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)


def test_residual_is_causal():
  ids_BT = np.random.default_rng(2).integers(0, TOY.vocabulary, (1, 7))
  changed = ids_BT.copy()
  changed[0, 4] = (changed[0, 4] + 1) % TOY.vocabulary
  before, after = (np.asarray(llama.residual(TOY, toy_params(), ids, 2)) for ids in (ids_BT, changed))
  np.testing.assert_array_equal(before[0, :4], after[0, :4])
  assert (before[0, 4:] != after[0, 4:]).any(axis=-1).all()


def test_residual_needs_only_the_layers_before_the_site():
  params, ids_BT = toy_params(), np.arange(6).reshape(2, 3)
  truncated = {key: value[:2] if key not in ('embedding', 'final_norm') else value for key, value in params.items()}
  np.testing.assert_array_equal(llama.residual(TOY, truncated, ids_BT, 1), llama.residual(TOY, params, ids_BT, 1))
  with pytest.raises(ValueError, match='2 layers loaded'):
    llama.residual(TOY, truncated, ids_BT, 2)
  with pytest.raises(ValueError, match='all 3 layers'):
    llama.logits(TOY, truncated, ids_BT)


@pytest.mark.parametrize('layer', [0, 2])
def test_logits_after_own_residual_are_the_logits(layer):
  params, ids_BT = toy_params(), np.arange(6).reshape(2, 3)
  x_BTD = llama.residual(TOY, params, ids_BT, layer)
  np.testing.assert_allclose(
    llama.logits_after(TOY, params, x_BTD, layer), llama.logits(TOY, params, ids_BT), rtol=1e-5, atol=1e-5
  )


def test_flops_count_every_multiply_add_of_a_window():
  window, layer = 5, 1
  total = 0
  for t in range(window):
    matrices = TOY.d_model * (TOY.n_heads + 2 * TOY.n_kv_heads) * TOY.d_head
    matrices += TOY.n_heads * TOY.d_head * TOY.d_model + 3 * TOY.d_model * TOY.d_ffn
    attention = TOY.n_heads * (t + 1) * TOY.d_head * 2
    total += 2 * (layer + 1) * (matrices + attention)
  assert llama.flops_per_token(TOY, layer, window) == pytest.approx(total / (window - 1))


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
  norm_T = np.linalg.norm(model.residual(np.concatenate([[0], prose_ids])[None], 12)[0], axis=-1)
  assert norm_T[0] == pytest.approx(20597, rel=1e-3)
  assert np.median(norm_T[1:]) == pytest.approx(140.2, rel=1e-3)
  assert norm_T[1:].max() == pytest.approx(181.6, rel=1e-3)


def test_smollm2_text_that_looks_like_a_control_token_is_text(model):
  ids = model.encode(['<|im_start|>x'])[0]
  assert 1 not in ids
  assert model.tokenizer.decode(ids) == '<|im_start|>x'


@pytest.mark.parametrize('site', ['resid_post.30', 'resid_post.-1', 'resid_post.01', 'resid_post', 'mlp_out.3', ''])
def test_site_unknown_is_refused_with_the_range(site):
  with pytest.raises(UserError, match=r'resid_post\.0 to resid_post\.29'):
    layer_of(site, 30)


@hypothesis.given(strategies.text(max_size=20), strategies.integers(1, 99))
@hypothesis.settings(max_examples=100, deadline=None)
def test_site_is_a_layer_or_an_error(site, n_layers):
  try:
    assert site == f'resid_post.{layer_of(site, n_layers)}'
  except UserError:
    assert site not in [f'resid_post.{i}' for i in range(n_layers)]


def test_site_of_every_layer_is_accepted():
  assert [layer_of(f'resid_post.{i}', 30) for i in range(30)] == list(range(30))


def test_names_unknown_are_refused():
  with pytest.raises(UserError, match=r"data.subject='gpt5'.*smollm2-135m"):
    subjects.load('gpt5')
  with pytest.raises(UserError, match=r"data.text='../etc'.*sotu"):
    text.load('../etc')


def test_packages_missing_name_the_remedy(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  for load in (lambda: smollm2.load(None), lambda: text.load('sotu')):
    with pytest.raises(UserError, match='make install'):
      load()


def test_text_hash_sees_names_and_borders():
  hashes = [text.sha256(d) for d in ([('a', 'bc')], [('ab', 'c')], [('a', 'b'), ('', 'c')], [('a', 'bd')])]
  assert len(set(hashes)) == 4


def write_gguf(path, arch: llama.Arch, params: dict, skip: str = '', architecture: str = 'llama', pre='smollm') -> None:
  """A tiny float32 file, laid out as llama.cpp writes it."""
  writer = gguf.GGUFWriter(path, architecture)
  writer.add_block_count(arch.n_layers)
  writer.add_context_length(arch.context)
  writer.add_embedding_length(arch.d_model)
  writer.add_feed_forward_length(arch.d_ffn)
  writer.add_head_count(arch.n_heads)
  writer.add_head_count_kv(arch.n_kv_heads)
  writer.add_rope_freq_base(arch.rope_base)
  writer.add_layer_norm_rms_eps(arch.norm_eps)
  writer.add_vocab_size(arch.vocabulary)
  writer.add_tokenizer_model('gpt2')
  writer.add_tokenizer_pre(pre)
  writer.add_token_list(['a', 'b', 'ab', '1', *(f'<{i}>' for i in range(arch.vocabulary - 4))])
  writer.add_token_merges(['a b'])

  def interleave(w_ED, heads):
    return w_ED.reshape(heads, 2, arch.d_head // 2, -1).swapaxes(1, 2).reshape(w_ED.shape)

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
WIDE = dataclasses.replace(TOY, d_model=24, d_head=4)


def wide_params() -> dict[str, np.ndarray]:
  rng = np.random.default_rng(3)
  shapes = llama.parameter_shapes(WIDE, WIDE.n_layers)
  return {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}


def test_gguf_round_trip_of_all_or_some_layers(tmp_path):
  params = wide_params()
  write_gguf(tmp_path / 'm.gguf', WIDE, params)
  model = gguf_llama.GGUFLlama(tmp_path / 'm.gguf')
  assert dataclasses.replace(model.arch, norm_eps=WIDE.norm_eps) == WIDE  # eps is stored in float32
  jax.tree.map(np.testing.assert_array_equal, model.params(3), params)
  np.testing.assert_array_equal(model.params(2)['qkv'], params['qkv'][:2])
  assert model.tokenizer().encode('ab11').ids == [2, 3, 3]


def test_gguf_that_is_not_this_kind_of_model_is_refused(tmp_path):
  (tmp_path / 'noise.gguf').write_bytes(b'\x80\x04not a model' * 50)
  with pytest.raises(UserError, match='not a readable GGUF'):
    gguf_llama.GGUFLlama(tmp_path / 'noise.gguf')
  write_gguf(tmp_path / 'other.gguf', WIDE, wide_params(), architecture='qwen2')
  with pytest.raises(UserError, match='not a llama'):
    gguf_llama.GGUFLlama(tmp_path / 'other.gguf')
  write_gguf(tmp_path / 'short.gguf', WIDE, wide_params(), skip='blk.1.ffn_up', pre='llama-bpe')
  model = gguf_llama.GGUFLlama(tmp_path / 'short.gguf')
  with pytest.raises(UserError, match=r'no tensor blk\.1\.ffn_up'):
    model.params(2)
  with pytest.raises(UserError, match='llama-bpe'):
    model.tokenizer()
