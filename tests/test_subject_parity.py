"""Every family against transformers: tests/subjects holds what it computed on tiny random models, at two weight scales.

Two arrays agree when no number differs by more than 1e-4 of their root mean square. Predictions in nats are differences
of logits, so they have the logits' root mean square.
"""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from sae_jax import subjects
from sae_jax.errors import UserError
from sae_jax.subjects import loading
from sae_jax.subjects.subject import Branches, Subject
from tests import tiny_subjects
from tests.tiny_subjects import KEPT, KEPT_EDITED, LARGE, NAMES, START, Config, Tensors

CASES = [(name, scale) for name in NAMES for scale in (1, LARGE)]
AGREE = 1e-4
# Where every family is edited, and where only some are: every site is a program to compile.
EDITS = ('z.0',)
MORE_EDITS = {
  'llama': ('resid_pre.0', 'attn_out.0', 'mlp_post.1'),
  'gpt_neox': ('mlp_post.0',),
  'gemma3': ('resid_mid.0', 'mlp_out.0', 'resid_post.0', 'resid_post.2'),
}


def agree(got: Any, want: np.ndarray, scale: float | None = None, what: str = '') -> None:
  got = np.asarray(got)
  assert got.shape == want.shape, f'{what}: {got.shape} is not {want.shape}'
  scale = scale or np.sqrt(np.mean(np.square(want, dtype=np.float64)))
  worst = np.abs(got - want).max() / scale
  assert worst < AGREE, f'{what} differs by {worst:.1e} of its root mean square'


@dataclasses.dataclass(frozen=True)
class Case:
  """A tiny model, loaded, with what transformers computed and what we compute at all of its sites."""

  subject: Subject
  ids_BT: np.ndarray
  want: Tensors
  sites: dict[str, np.ndarray]


@pytest.fixture(scope='module')
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Case]:
  @functools.cache
  def make(name: str, scale: int) -> Case:
    folder = tiny_subjects.scaled(tmp_path_factory.mktemp(name), name, scale)
    subject, every = subjects.load(str(folder)), tiny_subjects.reference(name)
    want = {key.removeprefix(f'{scale}/'): value for key, value in every.items() if key.startswith(f'{scale}/')}
    sites = [key for key in want if re.fullmatch(r'[a-z_]+\.\d', key)]
    found = map(np.asarray, subject.residuals(every['ids'], sites))
    return Case(subject, every['ids'], want, dict(zip(sites, found, strict=True)))

  return make


@pytest.mark.parametrize('name,scale', CASES)
def test_every_site_equals_transformers(case_of, name, scale):
  case = case_of(name, scale)
  widths = case.subject.family.widths(case.subject.arch)
  assert set(case.sites) == {f'{kind}.{layer}' for kind in widths for layer in range(case.subject.n_blocks)}
  for site, x_BTD in case.sites.items():
    agree(x_BTD[:, KEPT], case.want[site], what=site)
    assert x_BTD.shape[-1] == case.subject.width(site) and x_BTD.dtype == np.float32


@pytest.mark.parametrize('name,scale', CASES)
def test_logits_equal_those_of_transformers(case_of, name, scale):
  case = case_of(name, scale)
  logits_BTV = np.asarray(case.subject.logits(case.ids_BT))
  agree(logits_BTV[:, KEPT], case.want['logits'])
  logp_BTV = np.asarray(jax.nn.log_softmax(logits_BTV[:, :-1]))
  ce_BT = -np.take_along_axis(logp_BTV, case.ids_BT[:, 1:, None], axis=2)[..., 0]
  agree(ce_BT, case.want['ce'], scale=rms(case.want['logits']))


def rms(x: np.ndarray) -> float:
  return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


@pytest.mark.parametrize('name,scale', CASES)
def test_stream_is_the_sum_of_what_is_added(case_of, name, scale):
  sites = case_of(name, scale).sites
  for layer in range(case_of(name, scale).subject.n_blocks):
    total = sites[f'resid_pre.{layer}'] + sites[f'attn_out.{layer}'] + sites[f'mlp_out.{layer}']
    agree(total, sites[f'resid_post.{layer}'], what=f'layer {layer}')
    if f'resid_mid.{layer}' in sites:
      agree(total - sites[f'mlp_out.{layer}'], sites[f'resid_mid.{layer}'], what=f'layer {layer}')


@pytest.mark.parametrize('name,scale', CASES)
def test_predictions_after_an_edit_equal_those_of_transformers(case_of, name, scale):
  case = case_of(name, scale)
  for site in (*EDITS, *MORE_EDITS.get(name, ())):
    x_BTD = case.sites[site].copy()
    x_BTD[:, START:] = tiny_subjects.edited(x_BTD[:, START:])
    ce_BT, kl_BT = case.subject.next_token(x_BTD, case.ids_BT, site)
    unit = rms(case.want[f'edit.{site}'])
    agree(ce_BT, case.want[f'edit.{site}.ce'], unit, site)
    agree(kl_BT, case.want[f'edit.{site}.kl'], unit, site)
    assert np.abs(kl_BT[:, :START]).max() < 1e-6 * unit < kl_BT[:, START:].max()


@pytest.mark.parametrize('name,scale', CASES)
def test_prefix_and_suffix_equal_whole_windows(case_of, name, scale):
  """The second edit is none at all: its logits are the clean ones."""
  case = case_of(name, scale)
  whole_BTV = np.asarray(case.subject.logits(case.ids_BT))
  for site in (*EDITS, *MORE_EDITS.get(name, ())):
    for row in range(len(case.ids_BT)):
      cache = case.subject.prefix(case.ids_BT[row : row + 1], site)
      clean_SD = case.sites[site][row, START:]
      # `edited` counts through both rows.
      x_PSD = np.stack([tiny_subjects.edited(case.sites[site][:, START:])[row], clean_SD])
      logits_PSV = np.asarray(case.subject.logits_from(cache, x_PSD, site, START))
      agree(logits_PSV[0, [i - START for i in KEPT_EDITED]], case.want[f'edit.{site}'][row], what=site)
      agree(logits_PSV[1], whole_BTV[row, START:], what=site)


@pytest.mark.parametrize('name', NAMES)
def test_last_token_of_rows_of_different_lengths(case_of, name):
  """Rows are filled up on their right with ids that must not matter."""
  case, last_B = case_of(name, LARGE), np.array([KEPT[2], KEPT[1]])
  ids_BT = np.where(np.arange(case.ids_BT.shape[1]) > last_B[:, None], 3, case.ids_BT)
  site = f'resid_post.{case.subject.n_blocks - 1}'
  want_BD = case.want[site][[0, 1], [2, 1]]
  agree(case.subject.residual_at(ids_BT, last_B, site), want_BD)


@pytest.mark.parametrize('name', NAMES)
def test_texts_that_begin_alike_are_branches_of_one_tree(case_of, name):
  """A text, and one that goes on differently after four tokens and then differs once more."""
  case = case_of(name, LARGE)
  site = f'resid_post.{case.subject.n_blocks - 1}'
  first, other = case.ids_BT[0, :10].tolist(), [3, 5, 4, 7]
  paths = [list(range(10)), [*range(4), 10, 11, 12], [*range(4), 10, 13]]
  ids, position_T = np.array([[*first, *other]], np.int32), np.array([*range(10), 4, 5, 6, 5])
  seen_TT = np.zeros((14, 14), bool)
  for path in paths:
    for i, token in enumerate(path):
      seen_TT[token, path[: i + 1]] = True
  found_1TD = np.asarray(case.subject.residual_of_branches(ids, site, Branches(position_T, seen_TT)))
  for path in paths:
    agree(found_1TD[:, path], np.asarray(case.subject.residual(ids[:, path], site)), what=str(path))


def test_site_that_a_parallel_model_lacks_is_refused(case_of):
  with pytest.raises(UserError, match=r"'resid_mid.0' is not a site"):
    case_of('gpt_neox', 1).subject.residual(np.zeros((1, 2), np.int32), 'resid_mid.0')


def same(found: pathlib.Path, wanted: pathlib.Path) -> None:
  """Two folders hold one model."""
  a, b = subjects.load(str(found)), subjects.load(str(wanted))
  assert a.arch == b.arch
  jax.tree.map(np.testing.assert_array_equal, a.params, b.params)


def old_rope(config: Config) -> None:
  """rope_parameters as files before 2026 have it: the base beside a section of scaling, which calls its rule a type."""
  rope = config.pop('rope_parameters')
  config['rope_theta'] = rope.pop('rope_theta')
  if (kind := rope.pop('rope_type')) != 'default':
    config['rope_scaling'] = rope | {'type': kind}


def old_llama(config: Config) -> None:
  old_rope(config)
  config['rope_scaling'] |= {'rope_type': config['rope_scaling']['type']}  # many files have both
  del config['tie_word_embeddings']


def old_qwen2(config: Config) -> None:
  old_rope(config)
  del config['layer_types']
  config |= {'sliding_window': 8, 'use_sliding_window': False, 'max_window_layers': 1, 'rope_scaling': None}


def old_neox(config: Config) -> None:
  rope = config.pop('rope_parameters')
  config |= {'rotary_pct': rope['partial_rotary_factor'], 'rotary_emb_base': int(rope['rope_theta'])}


def old_gemma2(config: Config) -> None:
  old_rope(config)
  del config['layer_types'], config['tie_word_embeddings'], config['use_bidirectional_attention']
  config |= {'cache_implementation': 'hybrid', 'hidden_act': 'gelu_pytorch_tanh'}


def old_gemma3(config: Config) -> None:
  rope = config.pop('rope_parameters')
  config |= {'rope_theta': rope['full_attention'].pop('rope_theta')}
  config |= {'rope_local_base_freq': rope['sliding_attention']['rope_theta'], 'sliding_window_pattern': 3}
  full = rope['full_attention']
  config['rope_scaling'] = None if full['rope_type'] == 'default' else full
  del config['layer_types'], config['_sliding_window_pattern'], config['use_bidirectional_attention']


OLD = {
  'llama': old_llama,
  'qwen2': old_qwen2,
  'gpt_neox': old_neox,
  'gemma2': old_gemma2,
  'gemma3': old_gemma3,
  'gemma3_linear': old_gemma3,
}


@pytest.mark.parametrize('name', OLD)
def test_both_dialects_of_settings_mean_the_same(tmp_path, name):
  def older(config: Config, tensors: Tensors) -> None:
    OLD[name](config)
    config['torch_dtype'] = config.pop('dtype', 'float32')
    config['transformers_version'] = '4.40.0'

  same(tiny_subjects.copy(tmp_path / 'old', name, older), tiny_subjects.copy(tmp_path / 'new', name))


def seven_layers(config: Config, tensors: Tensors) -> None:
  config['num_hidden_layers'] = 7
  config['layer_types'] = [*['sliding_attention'] * 5, 'full_attention', 'sliding_attention']
  for name in [key for key in tensors if '.layers.0.' in key]:
    tensors.update({name.replace('.0.', f'.{i}.', 1): tensors[name] for i in range(3, 7)})


def test_gemma3_that_leaves_out_its_constants_has_the_usual_ones(tmp_path):
  def left_out(config: Config, tensors: Tensors) -> None:
    seven_layers(config, tensors)
    for key in ('layer_types', '_sliding_window_pattern', 'rope_parameters', 'hidden_activation', 'rms_norm_eps'):
      del config[key]

  same(
    tiny_subjects.copy(tmp_path / 'short', 'gemma3', left_out),
    tiny_subjects.copy(tmp_path / 'long', 'gemma3', seven_layers),
  )


def arch_after(folder: pathlib.Path, name: str, **values: Any) -> Any:
  """The sizes of a tiny model with these settings; without those that are `...`."""
  config, tensors = tiny_subjects.read(name)
  config = {key: value for key, value in (config | values).items() if value is not ...}
  return subjects.load(str(tiny_subjects.write(folder, config, tensors)), 'resid_pre.0').arch


def test_null_says_none_where_a_missing_setting_means_the_default(tmp_path):
  for value, cap, windows in ((..., (50.0, 30.0), (4096, 4096)), (None, (None, None), ())):
    gemma = arch_after(tmp_path, 'gemma2', attn_logit_softcapping=value, final_logit_softcapping=value)
    assert (gemma.score_cap, gemma.logit_cap) == cap
    assert arch_after(tmp_path, 'mistral', sliding_window=value).windows == windows


def of_gpt2_hub(config: Config, tensors: Tensors) -> None:
  """As the file of 2019: no prefix, and masks among the weights."""
  for name in list(tensors):
    tensors[name.removeprefix('transformer.')] = tensors.pop(name)
  for layer in range(2):
    tensors[f'h.{layer}.attn.bias'] = np.tril(np.ones((1, 1, 64, 64), np.float32))
    tensors[f'h.{layer}.attn.masked_bias'] = np.float32(-1e4).reshape(1)
  config |= {'n_ctx': 64, 'task_specific_params': {'text-generation': {'do_sample': True, 'max_length': 50}}}
  config |= {'n_special': 0, 'predict_special_tokens': True, 'output_past': True, '_num_labels': 1}


def of_pythia_hub(config: Config, tensors: Tensors) -> None:
  for layer in range(2):
    tensors[f'gpt_neox.layers.{layer}.attention.bias'] = np.tril(np.ones((1, 1, 64, 64), bool))
    tensors[f'gpt_neox.layers.{layer}.attention.masked_bias'] = np.float32(-1e9).reshape(())
    tensors[f'gpt_neox.layers.{layer}.attention.rotary_emb.inv_freq'] = np.ones(2, np.float32)
  config |= {'attention_probs_dropout_prob': 0.1, 'hidden_dropout_prob': 0.1}


def of_llama_hub(config: Config, tensors: Tensors) -> None:
  for layer in range(2):
    tensors[f'model.layers.{layer}.self_attn.rotary_emb.inv_freq'] = np.ones(8, np.float32)
  config |= {'is_llama_config': True, 'rope_interleaved': False, 'transformers.js_config': {'dtype': 'q4'}}


def of_gemma2_hub(config: Config, tensors: Tensors) -> None:
  config |= {'sliding_window_size': 4096, '_attn_implementation': 'eager', 'cache_implementation': 'hybrid'}


def of_gemma3_with_eyes(prefix: str) -> Callable[[Config, Tensors], None]:
  """The text half of a model that sees: settings and tensors lie one level deeper, beside those of the other half."""

  def change(config: Config, tensors: Tensors) -> None:
    for name in list(tensors):
      tensors[prefix + name.removeprefix('model.')] = tensors.pop(name)
    tensors['vision_tower.vision_model.embeddings.patch_embedding.weight'] = np.ones((4, 3, 2, 2), np.float32)
    tensors['multi_modal_projector.mm_input_projection_weight'] = np.ones((4, 48), np.float32)
    text = dict(config)
    config.clear()
    config |= {
      'model_type': 'gemma3',
      'architectures': ['Gemma3ForConditionalGeneration'],
      'text_config': text,
      'vision_config': {'model_type': 'siglip_vision_model', 'hidden_size': 4},
      'mm_tokens_per_image': 256,
      'boi_token_index': 98,
      'eoi_token_index': 99,
      'image_token_index': 100,
      'dtype': 'float32',
    }

  return change


def named_head(config: Config, tensors: Tensors) -> None:
  """Tied heads, whose matrix is in the file all the same."""
  tensors['lm_head.weight'] = tensors['transformer.wte.weight']


HUB = {
  'gpt2': of_gpt2_hub,
  'gpt_neox': of_pythia_hub,
  'llama': of_llama_hub,
  'gemma2': of_gemma2_hub,
  'gemma3': of_gemma3_with_eyes('model.language_model.'),
  'gemma3 ': of_gemma3_with_eyes('language_model.model.'),
}


@pytest.mark.parametrize('name', HUB)
def test_files_as_hubs_have_them_hold_the_same_model(tmp_path, name):
  one = name.strip()
  same(tiny_subjects.copy(tmp_path / 'hub', one, HUB[name]), tiny_subjects.copy(tmp_path / 'plain', one))


def test_head_that_is_stored_though_tied_changes_nothing(case_of, tmp_path):
  subject = subjects.load(str(tiny_subjects.copy(tmp_path, 'gpt2', named_head)))
  case = case_of('gpt2', 1)
  agree(np.asarray(subject.logits(case.ids_BT))[:, KEPT], case.want['logits'])


def test_head_that_is_not_stored_is_the_embedding(tmp_path):
  """Older files do not say that the head is tied: the absence of the tensor does."""
  same(
    tiny_subjects.copy(tmp_path / 'silent', 'qwen2', lambda config, tensors: config.pop('tie_word_embeddings')),
    tiny_subjects.copy(tmp_path / 'said', 'qwen2'),
  )


@pytest.mark.parametrize('name', ['llama', 'gemma3'])
@pytest.mark.parametrize('kind', [np.float16, ml_dtypes.bfloat16])
def test_half_precision_files_are_read_exactly(tmp_path, name, kind):
  """What is computed from weights, such as the 1 that a family adds, is computed in float32."""
  config, tensors = tiny_subjects.read(name)
  half = {key: value.astype(kind) for key, value in tensors.items()}
  same(
    tiny_subjects.write(tmp_path / 'half', config, half),
    tiny_subjects.write(tmp_path / 'whole', config, {key: value.astype(np.float32) for key, value in half.items()}),
  )


def test_weights_kept_in_half_the_memory_are_multiplied_in_float32(case_of, tmp_path):
  """Those of this model need no more bits, so nothing is lost."""
  subject, case = subjects.load(str(tiny_subjects.copy(tmp_path, 'qwen3')), weights='bfloat16'), case_of('qwen3', 1)
  assert {str(array.dtype) for array in jax.tree.leaves(subject.params)} == {'bfloat16'}
  agree(np.asarray(subject.logits(case.ids_BT))[:, KEPT], case.want['logits'])
  agree(subject.residual(case.ids_BT, 'resid_post.1')[:, KEPT], case.want['resid_post.1'])


def sharded(folder: pathlib.Path, name: str, count: int = 3) -> pathlib.Path:
  """A tiny model whose tensors lie in several files."""
  config, tensors = tiny_subjects.read(name)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'config.json').write_text(json.dumps(config))
  place = {}
  for i, part in enumerate(np.array_split(sorted(tensors), count)):
    file = f'model-{i + 1:05}-of-{count:05}.safetensors'
    place |= dict.fromkeys(map(str, part), file)
    save_file({str(key): tensors[key] for key in part}, folder / file, metadata={'format': 'pt'})
  total = sum(value.nbytes for value in tensors.values())
  index = {'metadata': {'total_size': total, 'total_parameters': total // 4}, 'weight_map': place}
  (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
  return folder


def test_weights_in_several_files_are_the_same_model(tmp_path):
  same(sharded(tmp_path / 'three', 'llama'), tiny_subjects.copy(tmp_path / 'one', 'llama'))


def test_some_blocks_are_the_first_of_all(case_of, tmp_path):
  subject = subjects.load(str(tiny_subjects.copy(tmp_path, 'gemma3')), 'z.1')
  case = case_of('gemma3', 1)
  assert subject.n_blocks == 2
  for site, x_BTD in zip(('resid_post.0', 'z.1'), subject.residuals(case.ids_BT, ['resid_post.0', 'z.1']), strict=True):
    agree(x_BTD, case.sites[site], what=site)


@pytest.mark.parametrize('shape, dtype', [((3, 5, 7), 'float32'), ((1,), 'float32'), ((2, 9), 'bfloat16')])
def test_weights_are_read_into_the_memory_that_the_model_keeps(shape, dtype):
  room = loading._room(shape, dtype)
  room[...] = np.arange(room.size).reshape(shape)
  assert room.shape == shape and np.shares_memory(np.asarray(jax.device_put(room)), room)


def test_text_that_looks_like_a_control_token_is_text():
  model = subjects.load(str(tiny_subjects.FOLDER / 'llama'))
  control = [token for token in model.tokenizer.get_added_tokens_decoder().values() if token.special]
  assert control
  for token in control:
    (ids,) = model.encode([f'the{token.content}'])
    assert model.tokenizer.token_to_id(token.content) not in ids
