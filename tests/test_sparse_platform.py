"""Which path of the sparse products a platform gets, and that the step lowers and compiles for chips not at hand."""

import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sae_jax import gradients, sae, sharding, sparse
from sae_jax.axes import Shard
from sae_jax.config import LossConfig, MeshConfig, SAEConfig

KERNEL = '__gpu$xla.gpu.triton'


def products(z_BK, idx_BK, w_FD, x_BD):
  """All sparse products, inside a condition inside a loop as AuxK and a chunked step have them."""

  def step(_, w_FD):
    def some(w_FD):
      g_BD = sparse.decode(z_BK, idx_BK, w_FD)
      dz_BK = sparse.code_gradient(idx_BK, w_FD, g_BD)
      enc_FD, dec_FD = sparse.add_weight_gradients(w_FD, w_FD, idx_BK, dz_BK, x_BD, z_BK, g_BD)
      return enc_FD + sparse.add_at(dec_FD[:, 0], idx_BK, dz_BK)[:, None]

    return jax.lax.cond(jnp.sum(w_FD) > 0, some, lambda w_FD: w_FD, w_FD)

  return jax.lax.fori_loop(0, 3, step, w_FD)


def shapes(batch: int, n_latents: int, width: int, k: int) -> list[jax.ShapeDtypeStruct]:
  floats = {'z': (batch, k), 'w': (n_latents, width), 'x': (batch, width)}
  z, w, x = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in floats.values())
  return [z, jax.ShapeDtypeStruct((batch, k), jnp.int32), w, x]


def lowered(platform: str, *sizes: int) -> str:
  return jax.jit(products).trace(*shapes(*sizes)).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
  'platform, device, sizes, path',
  [
    ('cpu', 'cpu', (64, 512, 32, 4), 'loops'),
    ('cuda', 'gpu', (64, 512, 32, 4), 'kernels'),
    ('cuda', 'gpu', (61, 503, 31, 3), 'kernels'),
    ('cuda', 'gpu', (2**17, 2**18, 2**13, 4), 'loops'),  # past Triton's int32 offsets
    ('tpu', 'tpu', (64, 512, 32, 4), 'dense'),
    ('tpu', 'tpu', (61, 503, 31, 3), 'dense'),
    ('tpu', 'tpu', (64, 2**20, 768, 32), 'loops'),
  ],
)
def test_a_program_takes_the_path_that_describe_names(platform, device, sizes, path):
  words = {'loops': 'loops over slots', 'kernels': 'Triton kernels', 'dense': 'dense matmuls'}
  assert words[path] in sparse.describe(device, *sizes)
  text = lowered(platform, *sizes)
  kernels = 5 if path == 'kernels' else 1 if platform == 'cuda' else 0  # add_at has no weight to address
  assert text.count(KERNEL) == kernels
  assert ('dot_general' in text) == (platform == 'tpu')
  # Atomics are what makes a GPU's scatter of floats differ from run to run.
  assert ('stablehlo.scatter' in text) == (path == 'loops')


def test_forced_holds_on_every_platform():
  sizes = (64, 512, 32, 4)
  with sparse.forced('loops'):
    assert 'forced' in sparse.describe('gpu', *sizes)
    text = jax.jit(lambda *args: products(*args)).trace(*shapes(*sizes)).lower(lowering_platforms=('cuda',))
  assert KERNEL not in text.as_text()
  assert KERNEL in lowered('cuda', *sizes)


@pytest.mark.parametrize('n_latents, width, k', [(2**14, 768, 32), (2**17, 8192, 256), (2**20, 768, 32)])
def test_more_slots_never_leave_the_dense_path(n_latents, width, k):
  """On a TPU dense work hardly grows with k and row reads grow with it, so there is one crossing."""
  dense = ['dense' in sparse.describe('tpu', 64, n_latents, width, k << i) for i in range(9)]
  assert dense == sorted(dense)


def sharded_step(mesh: Mesh, n_latents: int, width: int, k: int, batch: int, selection: str = 'exact'):
  """The real per-shard function with AuxK on, sharded over both axes, and the shapes it takes."""
  config = SAEConfig(
    d_model=width,
    n_latents=n_latents,
    k=k,
    activation='topk',
    k_aux=2 * k,
    fired_threshold=1e-3,
    latent_bias=True,
    selection=selection,
  )
  loss = LossConfig(aux_coefficient=1 / 32, dead_tokens=10 * batch)

  def step(params, idle_F, x_BD, scale):
    return gradients.loss_and_grads(
      params, idle_F, x_BD, scale, sae=config, loss=loss, batch=batch, shard=Shard(sharding.axes_of(mesh))
    )

  layouts = sharding.layouts(sae.shapes(config))
  specs = (layouts, P('latent'), sharding.BATCH, P())
  mapped = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=(layouts, P('latent'), P()), check_vma=False)
  arrays = (
    {
      'w_enc_FD': (n_latents, width),
      'w_dec_FD': (n_latents, width),
      'b_enc_F': (n_latents,),
      'b_pre_D': (width,),
    },
    (n_latents,),
    (batch, width),
    (),
  )
  dtypes = (jnp.float32, jnp.int32, jnp.float32, jnp.float32)
  args = [
    jax.tree.map(
      lambda shape, spec, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec)),
      shape,
      spec,
      is_leaf=lambda a: isinstance(a, tuple),
    )
    for shape, spec, dtype in zip(arrays, specs, dtypes, strict=True)
  ]
  return jax.jit(mapped, donate_argnums=(0, 1)), args


def test_the_sharded_step_lowers_for_cuda_with_kernels():
  mesh = sharding.make_mesh(MeshConfig(data=2, latent=4))
  step, args = sharded_step(mesh, 512, 31, 4, batch=22)
  text = step.trace(*args).lower(lowering_platforms=('cuda',)).as_text()
  assert text.count(KERNEL) == 10  # AuxK and the main part each: decode, code gradient, two of a weight gradient, sums
  # Integers, as of the fired mask, have exact sums in any order; floats have not, unless no row is written twice.
  scatters = re.findall(r'stablehlo\.scatter"(.*?)\^bb0\(%\w+: tensor<(\w+)>', text, re.DOTALL)
  assert {kind for _, kind in scatters} == {'i8', 'i32', 'f32'}
  assert all('unique_indices = true' in head for head, kind in scatters if kind == 'f32')


@pytest.mark.tpu
@pytest.mark.parametrize(
  'topology, selection', [('v5e:2x2', 'exact'), ('v5p:2x2x1', 'exact'), ('v5e:2x2', 'approximate')]
)
def test_the_sharded_step_compiles_for_tpu(topology, selection):
  """Compiled, not run: needs libtpu, no chip."""
  from jax.experimental import topologies

  for name, value in {'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}.items():
    os.environ.setdefault(name, value)
  devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
  mesh = Mesh(np.array(devices).reshape(2, 2), ('data', 'latent'))
  step, args = sharded_step(mesh, 2 * 1031, 129, 5, 2 * 67, selection)  # nothing is a multiple of a block
  compiled = step.lower(*args).compile()
  assert 'dense' in sparse.describe('tpu', 67, 1031, 129, 5)
  assert 'convolution' in compiled.as_text()
  assert ('PartialReduce' in compiled.as_text()) == (selection == 'approximate')  # what XLA makes of approx_max_k
  assert compiled.memory_analysis().temp_size_in_bytes < 64 * 2**20
