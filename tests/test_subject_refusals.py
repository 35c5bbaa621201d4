"""Folders that are not sound models: each is refused in one line that names the value, the rule and the remedy."""

import json
import os
import pathlib
import struct
from collections.abc import Callable
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from sae_jax import subjects
from sae_jax.errors import UserError
from tests import tiny_subjects
from tests.tiny_subjects import Config, Tensors

FILE, INDEX = 'model.safetensors', 'model.safetensors.index.json'


def setting(**values: Any) -> Callable[[Config, Tensors], None]:
  """Sets values of the config; those that are `...` it loses."""

  def change(config: Config, tensors: Tensors) -> None:
    config.update(values)
    for key in [key for key, value in values.items() if value is ...]:
      del config[key]

  return change


def tensor(name: str, value: Any) -> Callable[[Config, Tensors], None]:
  """Sets a tensor to an array or to what a function makes of it; the file loses it where that is None."""

  def change(config: Config, tensors: Tensors) -> None:
    new = value(tensors[name]) if callable(value) else value
    tensors.update({name: new})
    if new is None:
      del tensors[name]

  return change


Q = 'model.layers.1.self_attn.q_proj.weight'
ROPE = {'rope_theta': 1e4, 'rope_type': 'yarn', 'factor': 4.0}
LLAMA3 = {'rope_theta': 1e4, 'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0}
# What is changed, in which tiny model, and what the one line must say.
SETTINGS = {
  'kind unknown': ('llama', setting(model_type='mamba'), r"'mamba' is not known.*docs/add_a_subject\.md"),
  'kind missing': ('llama', setting(model_type=...), r'no model_type'),
  'kind is a number': ('llama', setting(model_type=7), r"model_type='7' is not a name"),
  'kind of another family': ('llama', setting(model_type='gpt2'), r'no n_embd'),
  'activation unknown': ('llama', setting(hidden_act='relu2'), r"hidden_act='relu2' .*silu"),
  'activation of gpt2': ('gpt2', setting(activation_function='relu'), r"activation_function='relu' .*gelu_new"),
  'activation of neox': ('gpt_neox', setting(hidden_act='swish'), r"hidden_act='swish' .*gelu"),
  'activation of gemma': ('gemma2', setting(hidden_activation='silu'), r"hidden_activation='silu' .*gelu_pytorch_tanh"),
  'rotary rule unknown': ('llama', setting(rope_parameters=ROPE), r"rope_parameters\.rope_type='yarn' .*llama3"),
  'rotary rule unknown, of before': (
    'llama',
    setting(rope_parameters=..., rope_theta=1e4, rope_scaling={'type': 'dynamic', 'factor': 2.0}),
    r"rope_scaling\.type='dynamic' .*llama3",
  ),
  'rotary rule incomplete': (
    'llama',
    setting(rope_parameters=LLAMA3),
    r'no rope_parameters\.original_max_position_embeddings',
  ),
  'rotary factors crossed': (
    'llama',
    setting(rope_parameters=LLAMA3 | {'low_freq_factor': 4.0, 'original_max_position_embeddings': 64}),
    r'high_freq_factor.*low_freq_factor',
  ),
  'rotary part odd': (
    'gpt_neox',
    setting(rope_parameters={'rope_type': 'default', 'rope_theta': 1e4, 'partial_rotary_factor': 0.2}),
    r'3 of 16 channels',
  ),
  'rotary part beyond the head': (
    'gpt_neox',
    setting(rope_parameters={'rope_type': 'default', 'rope_theta': 1e4, 'partial_rotary_factor': 2.0}),
    r'32 of 16 channels',
  ),
  'rotary part of a llama': (
    'llama',
    setting(rope_parameters={'rope_type': 'default', 'rope_theta': 1e4, 'partial_rotary_factor': 0.5}),
    r'8 turn',
  ),
  'thetas that differ': ('llama', setting(rope_theta=5e5), r"rope_theta='500000\.0' contradicts rope_parameters"),
  'factor of nought': ('llama', setting(residual_multiplier=0), r"'residual_multiplier'='0' is not understood"),
  'kinds of layers in mistral': (
    'mistral',
    setting(layer_types=['full_attention', 'sliding_attention']),
    r'layer_types=.* is not a list of 2 of sliding_attention',
  ),
  'heads do not divide the width': ('gpt2', setting(n_head=5), r"n_head='5' does not divide n_embd=48"),
  'heads do not divide the width of a neox': ('gpt_neox', setting(num_attention_heads=5), r"heads='5' does not divide"),
  'heads that keys do not divide': ('llama', setting(num_key_value_heads=4), r"'4' does not divide .*=6"),
  'heads that keys do not divide in gemma': ('gemma3', setting(num_key_value_heads=4), r"'4' does not divide .*=6"),
  'heads too many': ('llama', setting(num_attention_heads=8), r'q_proj\.weight .*\(96, 48\).*\(128, 48\)'),
  'heads missing': ('llama', setting(num_attention_heads=...), r'no num_attention_heads'),
  'layers more than weights': ('llama', setting(num_hidden_layers=3), r'no tensor model\.layers\.2\.'),
  'layers fewer than weights': ('llama', setting(num_hidden_layers=1), r"model\.layers\.1\.\S+' is not known"),
  'layers astronomical': (
    'llama',
    setting(num_hidden_layers=10**9),
    r"num_hidden_layers='1000000000' is not a whole number from 1 to 1000$",
  ),
  'width astronomical': ('llama', setting(hidden_size=10**30), r"hidden_size='1000000\d+' is not a whole number"),
  'width is text': ('llama', setting(hidden_size='48'), r"hidden_size='48' is not a whole number"),
  'width is true': ('llama', setting(hidden_size=True), r"hidden_size='True' is not a whole number"),
  'width is a fraction': ('llama', setting(hidden_size=48.5), r"hidden_size='48\.5' is not a whole number"),
  'width is negative': ('gpt2', setting(n_embd=-48), r"n_embd='-48' is not a whole number"),
  'width is a list': ('llama', setting(hidden_size=[48]), r'hidden_size=.* is not a whole number'),
  'context is nought': ('llama', setting(max_position_embeddings=0), r"max_position_embeddings='0' is not a whole"),
  'epsilon is NaN': ('llama', setting(rms_norm_eps=float('nan')), r'rms_norm_eps|settings in JSON'),
  'epsilon is infinite': ('gemma2', setting(rms_norm_eps=float('inf')), r'rms_norm_eps|settings in JSON'),
  'epsilon is negative': (
    'gpt2',
    setting(layer_norm_epsilon=-1e-5),
    r"layer_norm_epsilon='-1e-05' is not a number from",
  ),
  'epsilon is huge': ('llama', setting(rms_norm_eps=1e308), r"rms_norm_eps='1e\+308' is not a number"),
  'theta is huge': ('llama', setting(rope_parameters={'rope_theta': 1e308}), r"rope_theta='1e\+308' is not a number"),
  'cap is a word': (
    'gemma2',
    setting(final_logit_softcapping='off'),
    r"final_logit_softcapping='off' is not a number from",
  ),
  'scale of queries is nought': ('gemma2', setting(query_pre_attn_scalar=0), r"query_pre_attn_scalar='0' is not"),
  'window is nought': ('gemma2', setting(sliding_window=0), r"sliding_window='0' is not a whole number"),
  'window of mistral is nought': ('mistral', setting(sliding_window=0), r"sliding_window='0' is not a whole number"),
  'window in a llama': ('llama', setting(sliding_window=8), r"'sliding_window'='8' is not understood"),
  'layer kinds too few': ('gemma3', setting(layer_types=['full_attention']), r'layer_types=.* is not a list of 3'),
  'layer kind unknown': ('gemma3', setting(layer_types=['chunked'] * 3), r'layer_types=.* is not a list of 3'),
  'attention in both directions': (
    'gemma3',
    setting(use_bidirectional_attention=True),
    r'use_bidirectional_attention=',
  ),
  'attention by layer': ('gpt2', setting(scale_attn_by_inverse_layer_idx=True), r'scale_attn_by_inverse_layer_idx='),
  'attention unscaled': ('gpt2', setting(scale_attn_weights=False), r'scale_attn_weights='),
  'attention crossed': ('gpt2', setting(add_cross_attention=True), r'add_cross_attention='),
  'bias without a tensor': (
    'llama',
    setting(attention_bias=True),
    r'no tensor model\.layers\.0\.self_attn\.q_proj\.bias',
  ),
  'bias of gemma': ('gemma2', setting(attention_bias=True), r"attention_bias='True'"),
  'quantised': ('llama', setting(quantization_config={'bits': 4}), r"'quantization_config'=.* is not understood"),
  'experts': ('mistral', setting(num_local_experts=8), r"'num_local_experts'='8' is not understood"),
  'head said to be tied and another': (
    'llama',
    setting(tie_word_embeddings=True),
    r'tie_word_embeddings=True.*lm_head',
  ),
  'head said to be there and not': ('qwen2', setting(tie_word_embeddings=False), r'tie_word_embeddings=False.*lm_head'),
  'head tied or not is a word': ('qwen2', setting(tie_word_embeddings='yes'), r"tie_word_embeddings='yes' is not true"),
  'residuals parallel or not is a number': ('gpt_neox', setting(use_parallel_residual=1), r"'1' is not true or false"),
  'start token beyond the vocabulary': ('llama', setting(bos_token_id=101), r"bos_token_id='101' .*vocabulary of 101"),
  'vocabulary smaller than the embedding': (
    'llama',
    setting(vocab_size=100),
    r'embed_tokens\.weight .*\(101, 48\).*\(100',
  ),
  'text half is no section': ('gemma3', setting(text_config='small'), r"text_config='small' is not a section"),
}
TENSORS = {
  'missing': ('llama', tensor(Q, None), rf'no tensor {Q}'),
  'missing embedding': ('gpt2', tensor('transformer.wte.weight', None), r'no tensor transformer\.wte\.weight'),
  'unknown': (
    'llama',
    tensor('model.layers.0.adapter.weight', np.ones(3)),
    r"layers\.0\.adapter\.weight' is not known",
  ),
  'turned round': ('llama', tensor(Q, lambda x: x.T), rf'{Q} .*\(48, 96\).*\(96, 48\)'),
  'turned round of gpt2': (
    'gpt2',
    tensor('transformer.h.0.mlp.c_fc.weight', lambda x: x.T),
    r'c_fc\.weight .*\(192, 48\).*\(48, 192\)',
  ),
  'flat': ('llama', tensor(Q, lambda x: x.reshape(-1)), rf'{Q} .*\(4608,\)'),
  'empty': ('llama', tensor('model.norm.weight', np.ones(0, np.float32)), r"'model\.norm\.weight' is empty"),
  'whole numbers': ('llama', tensor(Q, lambda x: x.astype(np.int64)), rf'{Q} is I64.*F32, F16, BF16'),
  'NaN': ('llama', tensor(Q, lambda x: np.where(x == x.max(), np.nan, x).astype(np.float32)), rf'{Q} holds NaN'),
  'infinite': ('gpt_neox', tensor('embed_out.weight', lambda x: x / np.float32(0)), r'embed_out\.weight holds NaN'),
}


def refused(folder: pathlib.Path, says: str) -> None:
  with pytest.raises(UserError, match=says) as caught:
    subjects.load(str(folder))
  line = str(caught.value)
  assert '\n' not in line and len(line) < 500 + len(str(folder)) * 2, line


@pytest.mark.parametrize('name', SETTINGS)
@pytest.mark.filterwarnings('error')
def test_settings_that_are_not_understood_are_refused(tmp_path, name):
  model, change, says = SETTINGS[name]
  refused(tiny_subjects.copy(tmp_path, model, change), says)


@pytest.mark.parametrize('name', TENSORS)
@pytest.mark.filterwarnings('ignore:(divide|invalid)')
def test_tensors_that_are_not_the_models_are_refused(tmp_path, name):
  model, change, says = TENSORS[name]
  refused(tiny_subjects.copy(tmp_path, model, change), says)


def header(entries: Any, data: bytes = b'', length: int | None = None) -> bytes:
  text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
  return struct.pack('<Q', len(text) if length is None else length) + text + data


def entry(first: int, last: int, kind: str = 'F32') -> dict[str, Any]:
  return {'dtype': kind, 'shape': [(last - first) // 4], 'data_offsets': [first, last]}


BYTES = {
  'nothing': (b'', r'not a whole safetensors file'),
  'text': (b'version https://git-lfs.github.com/spec/v1\noid sha256:0\n', r'not a whole safetensors file'),
  'pickle': (b'\x80\x04}q\x00.' * 9, r'not a whole safetensors file'),
  'header beyond the file': (header({}, length=10**6), r'not a whole safetensors file'),
  'header of exabytes': (header({}, length=2**63), r'not a whole safetensors file'),
  'header that is not JSON': (header(b'{"a": '), r'not a whole safetensors file'),
  'header that is a list': (header([1, 2]), r'not a whole safetensors file'),
  'header without offsets': (header({'a': {'dtype': 'F32', 'shape': [1]}}, b'1234'), r'not a whole safetensors file'),
  'tensors that overlap': (header({'a': entry(0, 8), 'b': entry(4, 12)}, bytes(12)), r'not a whole safetensors file'),
  'tensors with a hole': (header({'a': entry(0, 4), 'b': entry(8, 12)}, bytes(12)), r'not a whole safetensors file'),
  'tensors beyond the file': (header({'a': entry(0, 4000)}, bytes(12)), r'not a whole safetensors file'),
  'tensors from below nought': (header({'a': entry(-4, 0)}, bytes(12)), r'not a whole safetensors file'),
  'shape that contradicts': (
    header({'a': entry(0, 8) | {'shape': [2**40, 2**40]}}, bytes(8)),
    r'not a whole safetensors file',
  ),
  'name twice': (
    header(
      b'{"a": ' + json.dumps(entry(0, 4)).encode() + b', "a": ' + json.dumps(entry(4, 8)).encode() + b'}', bytes(8)
    ),
    r'not a whole safetensors file',
  ),
  'type unknown': (header({'a': entry(0, 4, 'Q4')}, bytes(4)), r'not a whole safetensors file'),
  'tensors of nobody': (header({'a\x1b[2J\n': entry(0, 4)}, bytes(4)), r'no tensor model\.embed_tokens\.weight'),
}


@pytest.mark.parametrize('name', BYTES)
def test_hostile_and_broken_files_are_refused(tmp_path, name):
  tiny_subjects.copy(tmp_path, 'llama')
  data, says = BYTES[name]
  (tmp_path / FILE).write_bytes(data)
  refused(tmp_path, says)


@pytest.mark.parametrize('kept', [0.0, 0.01, 0.5, 0.999])
def test_truncated_file_is_refused(tmp_path, kept):
  whole = (tiny_subjects.copy(tmp_path, 'llama') / FILE).read_bytes()
  (tmp_path / FILE).write_bytes(whole[: int(kept * len(whole))])
  refused(tmp_path, 'not a whole safetensors file')


@pytest.mark.parametrize('name', ['config.json', FILE, 'tokenizer.json', 'm.gguf'])
def test_pipes_and_devices_are_refused_and_not_waited_for(tmp_path, name):
  tiny_subjects.copy(tmp_path, 'llama')
  (tmp_path / name).unlink(missing_ok=True)
  os.mkfifo(tmp_path / name)
  refused(tmp_path, r'is a pipe or a device')
  (tmp_path / name).unlink()
  (tmp_path / name).symlink_to('/dev/zero')
  refused(tmp_path, r'is a pipe or a device')


def test_pickle_is_refused_with_what_to_do_instead(tmp_path):
  tiny_subjects.copy(tmp_path, 'llama')
  (tmp_path / FILE).rename(tmp_path / 'pytorch_model.bin')
  refused(tmp_path, r'pytorch_model\.bin is a pickle.*safe_serialization')
  (tmp_path / 'pytorch_model.bin').unlink()
  refused(tmp_path, f'neither {FILE} nor')


def index(folder: pathlib.Path, **places: str) -> pathlib.Path:
  """Moves all tensors to a first shard, and has the index say so but for `places`."""
  config, tensors = tiny_subjects.read('llama')
  tiny_subjects.write(folder, config, tensors)
  (folder / FILE).rename(folder / 'model-00001-of-00002.safetensors')
  placed = dict.fromkeys(tensors, 'model-00001-of-00002.safetensors') | places
  (folder / INDEX).write_text(json.dumps({'metadata': {}, 'weight_map': placed}))
  return folder


SHARD = 'model-00002-of-00002.safetensors'
INDEXES = {
  'shard missing': ({Q: SHARD}, rf'names {SHARD}, which is not there'),
  'tensor in no shard': (
    {'model.ghost.weight': 'model-00001-of-00002.safetensors'},
    r"has 'model\.ghost\.weight', and it has not",
  ),
  'path upwards': ({Q: '../stolen.safetensors'}, r"names '\.\./stolen\.safetensors'"),
  'path from the root': ({Q: '/etc/passwd'}, r"names '/etc/passwd'"),
  'path of another kind': ({Q: 'config.json'}, r"names 'config\.json'"),
  'path with a nought': ({Q: 'a\0.safetensors'}, r'names '),
  'shard is a number': ({Q: 3}, r'weight_map=.* is not a table of names'),
}


@pytest.mark.parametrize('name', INDEXES)
def test_indexes_that_lie_are_refused(tmp_path, name):
  places, says = INDEXES[name]
  refused(index(tmp_path, **places), says)


def test_index_and_folder_that_contradict_are_refused(tmp_path):
  index(tmp_path)
  assert subjects.load(str(tmp_path)).n_blocks == 2
  for text, says in (
    ('{', 'not settings in JSON'),
    ('[]', 'not settings in JSON|is not a section'),
    ('{}', 'no weight_map'),
    ('{"weight_map": {}}', 'no tensor|names no|is empty'),
  ):
    (tmp_path / INDEX).write_text(text)
    refused(tmp_path, says)
  config, tensors = tiny_subjects.read('llama')
  tiny_subjects.write(tmp_path, config, tensors)
  refused(tmp_path, 'remove one of them')


def test_tensor_in_two_shards_is_refused(tmp_path):
  index(tmp_path, **{Q: SHARD})
  (tmp_path / SHARD).write_bytes((tmp_path / 'model-00001-of-00002.safetensors').read_bytes())
  refused(tmp_path, rf'\.weight. is in model-00001-of-00002\.safetensors and in {SHARD}')


@pytest.mark.parametrize(
  'text', ['', '{', 'null', '[]', '"llama"', '{"a": NaN}', '{"a": 1, "a": 2}', '\0', '[' * 10**5]
)
def test_config_that_is_no_settings_is_refused(tmp_path, text):
  (tiny_subjects.copy(tmp_path, 'llama') / 'config.json').write_text(text)
  refused(tmp_path, r'config\.json')


def test_config_that_is_bytes_or_nothing_is_refused(tmp_path):
  tiny_subjects.copy(tmp_path, 'llama')
  (tmp_path / 'config.json').write_bytes(b'\xff\xfe\x00')
  refused(tmp_path, r'config\.json is not settings in JSON')
  (tmp_path / 'config.json').unlink()
  refused(tmp_path, r'is not a model')
  with pytest.raises(UserError, match=r'is not a subject'):
    subjects.load(str(tmp_path / 'nowhere'))


NOISE = strategies.recursive(
  strategies.none()
  | strategies.booleans()
  | strategies.integers()
  | strategies.floats()
  | strategies.sampled_from([0, -1, 1, 48, 10**18, 1e308, 5e-324, '', 'silu', 'yarn', '\0', '\n']),
  lambda inner: (
    strategies.lists(inner, max_size=2) | strategies.dictionaries(strategies.text(max_size=3), inner, max_size=2)
  ),
  max_leaves=4,
)


@pytest.mark.parametrize('model', ['llama', 'gpt2', 'gpt_neox', 'gemma3'])
def test_any_noise_in_a_setting_loads_or_is_one_line(tmp_path, model):
  config, tensors = tiny_subjects.read(model)
  tiny_subjects.write(tmp_path, config, tensors)
  keys = sorted({*config, 'rope_scaling', 'rope_theta', 'sliding_window', 'head_dim', 'text_config'})

  @hypothesis.given(strategies.sampled_from(keys), NOISE)
  @hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
  def one(key: str, value: Any) -> None:
    (tmp_path / 'config.json').write_text(json.dumps(config | {key: value}))
    try:
      subjects.load(str(tmp_path), 'resid_pre.0')
    except UserError as error:
      assert str(error).isprintable()

  one()


def test_ids_beyond_the_vocabulary_are_refused(tmp_path):
  subject = subjects.load(str(tiny_subjects.copy(tmp_path, 'gpt2')))
  for bad in (101, -1):
    ids_BT = np.array([[0, bad]])
    for call in (
      subject.logits,
      lambda ids_BT: subject.residual(ids_BT, 'resid_post.0'),
      lambda ids_BT: subject.residual_at(ids_BT, np.array([1]), 'resid_post.0'),
      lambda ids_BT: subject.prefix(ids_BT, 'resid_post.0'),
      lambda ids_BT: subject.next_token(np.zeros((1, 2, 48), np.float32), ids_BT, 'resid_post.1'),
    ):
      with pytest.raises(UserError, match=rf'token id {bad} is not in the vocabulary of 101'):
        call(ids_BT)


def test_windows_beyond_the_context_are_refused(tmp_path):
  subject = subjects.load(str(tiny_subjects.copy(tmp_path, 'gpt2')))
  with pytest.raises(UserError, match=r'65 tokens is not from 1 to the context of 64'):
    subject.residual(np.zeros((1, 65), np.int32), 'resid_post.0')


def with_tokenizer(folder: pathlib.Path, change: Callable[[dict], None] | None = None) -> pathlib.Path:
  tiny_subjects.copy(folder, 'llama')
  table = json.loads((tiny_subjects.FOLDER / 'llama' / 'tokenizer.json').read_text())
  if change:
    change(table)
  (folder / 'tokenizer.json').write_text(json.dumps(table))
  return folder


def test_folder_without_a_tokenizer_has_logits_and_no_text(tmp_path):
  subject = subjects.load(str(tiny_subjects.copy(tmp_path, 'llama')))
  assert subject.logits(np.zeros((1, 2), np.int32)).shape == (1, 2, 101)
  for ask in (subject.encode, subject.encode_with_offsets):
    with pytest.raises(UserError, match=r'has no tokenizer, which text needs; put the tokenizer\.json'):
      ask(['the dog'])


def test_folder_with_a_tokenizer_has_text(tmp_path):
  subject = subjects.load(str(with_tokenizer(tmp_path)))
  ids, spans = subject.encode_with_offsets(['the lazy dog'])[0]
  assert (ids == subject.encode(['the lazy dog'])[0]).all() and len(ids) < 12
  assert subject.tokenizer is not None and subject.tokenizer.decode(ids) == 'the lazy dog'
  assert ''.join('the lazy dog'[a:b] for a, b in spans) == 'the lazy dog'


def cut_and_fill(table: dict) -> None:
  """As the folder of a model has it that was trained on texts of three tokens."""
  table['truncation'] = {'direction': 'Right', 'max_length': 3, 'strategy': 'LongestFirst', 'stride': 0}
  table['padding'] = {
    'strategy': 'BatchLongest',
    'direction': 'Right',
    'pad_to_multiple_of': None,
    'pad_id': 0,
    'pad_type_id': 0,
    'pad_token': '<pad>',
  }


def test_texts_are_neither_cut_nor_filled_up(tmp_path):
  changes = {'plain': None, 'cut': cut_and_fill}
  plain, cut = (subjects.load(str(with_tokenizer(tmp_path / name, change))) for name, change in changes.items())
  texts = ['the lazy dog', 'a']
  assert [ids.tolist() for ids in cut.encode(texts)] == [ids.tolist() for ids in plain.encode(texts)]


def drop(table: dict) -> None:
  table['model']['dropout'] = 0.1


def test_tokenizer_that_draws_lots_is_refused(tmp_path):
  refused(with_tokenizer(tmp_path, drop), r'dropout=0\.1')


def without_unknown(table: dict) -> None:
  table['model'] = {'type': 'WordLevel', 'vocab': {'a': 0}, 'unk_token': '?'}


def test_tokenizer_that_fails_on_a_text_is_one_line(tmp_path):
  subject = subjects.load(str(with_tokenizer(tmp_path, without_unknown)))
  for ask in (subject.encode, subject.encode_with_offsets):
    with pytest.raises(UserError, match=r'fails on a text \(.*; take the one of the model'):
      ask(['the dog'])


def add_words(special: bool) -> Callable[[dict], None]:
  """As many as make the last id one too large."""

  def change(table: dict) -> None:
    word = table['added_tokens'][0] | {'special': special}
    table['added_tokens'] += [word | {'id': id_, 'content': f'<{id_}>'} for id_ in range(96, 102)]

  return change


def move_piece(table: dict) -> None:
  """As many pieces as before, but one of them has an id beyond the embedding."""
  table['model']['vocab']['a'] = 5000


@pytest.mark.parametrize('change,id_', [(add_words(False), 101), (move_piece, 5000)])
def test_tokenizer_with_ids_beyond_the_embedding_is_refused(tmp_path, change, id_):
  refused(with_tokenizer(tmp_path, change), rf'the tokenizer has an id {id_} and the model a vocabulary of 101')


def test_special_tokens_beyond_the_embedding_stay_with_the_tokenizer(tmp_path):
  """Gemma 3 of 270M and 1B has one for pictures, and an embedding without it."""
  subject = subjects.load(str(with_tokenizer(tmp_path, add_words(True))))
  with pytest.raises(UserError, match=r'token id 101 is not in the vocabulary'):
    subject.logits(np.array([[subject.tokenizer.token_to_id('<101>')]]))
  with pytest.raises(UserError, match=r'a window of 0 tokens'):
    subject.logits(np.zeros((1, 0), np.int32))


@pytest.mark.parametrize('text', ['', '{}', '[]', '{"version": "1.0"}', '\0'])
def test_file_that_is_no_tokenizer_is_refused(tmp_path, text):
  (tiny_subjects.copy(tmp_path, 'llama') / 'tokenizer.json').write_text(text)
  refused(tmp_path, r'tokenizer\.json is not a tokenizer')


def test_any_byte_changed_in_a_header_loads_or_is_one_line(tmp_path):
  whole = bytearray((tiny_subjects.copy(tmp_path, 'llama') / FILE).read_bytes())
  length = 8 + int.from_bytes(whole[:8], 'little')

  @hypothesis.given(strategies.integers(0, length - 1), strategies.integers(0, 255))
  @hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
  def one(place: int, value: int) -> None:
    changed = whole.copy()
    changed[place] = value
    (tmp_path / FILE).write_bytes(changed)
    try:
      subjects.load(str(tmp_path), 'resid_pre.0')
    except UserError as error:
      assert str(error).isprintable()

  one()
