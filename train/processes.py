"""What the training loop does otherwise on a mesh and in several processes: where arrays lie, how all agree to stop.

Every process runs the same loop on arrays that span all devices. Batches are placed shard by shard, so that a process
puts only its rows on its devices; what one process decides by its clock or a signal, all do at the same step.

Stability: internal.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxinfer.errors import ConfigError
from jaxinfer.sharding.mesh import ROWS, make_mesh


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh that some leaf of the tree, an array or a sharding, lies on; None where all are on single devices."""
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", leaf)
        if isinstance(sharding, NamedSharding):
            return sharding.mesh if isinstance(sharding.mesh, Mesh) else None
    return None


def spread(tree: Any, mesh: Mesh) -> Any:
    """The tree on `mesh`: leaves that lie on it stay as they are, the others are copied to every device.

    All processes must hold the same values of these others.
    """
    whole = NamedSharding(mesh, PartitionSpec())

    def one(leaf: Any) -> Any:
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh == mesh:
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            impl = jax.random.key_impl(leaf)
            wrap = jax.jit(lambda data: jax.random.wrap_key_data(data, impl=impl), out_shardings=whole)
            return wrap(one(jax.random.key_data(leaf)))
        value = np.asarray(leaf)
        return jax.make_array_from_callback(value.shape, whole, lambda index: value[index])

    return jax.tree.map(one, tree)


def committed(tree: Any) -> Any:
    """The tree held to the one device that all its leaves lie on; as it is where there are several.

    jit compiles anew for arguments that are held to a device. Params that were restored are, an optimizer's first state
    is not, and what a step returns of the two is: its second call would compile a second time.
    """
    devices = {device for leaf in jax.tree.leaves(tree) for device in leaf.devices()}
    return jax.device_put(tree, devices.pop()) if len(devices) == 1 else tree


def place_batch(batch: Any, sharding: NamedSharding | None, *, local: bool = False) -> Any:
    """Host arrays of a batch on the devices of `sharding`, whose spec is for the leading axes; as they are where None.

    Each process places only its own shards of a batch that all have whole. `local`: each has only its own rows, and the
    batch is all of them in the processes' order. Raises `ConfigError` where a length cannot be divided.
    """
    if sharding is None:
        return batch

    def one(path: Any, leaf: Any) -> Any:
        value = np.asarray(leaf)
        spec = PartitionSpec(*sharding.spec[: value.ndim])
        placed = NamedSharding(sharding.mesh, spec)
        try:
            if local:
                return jax.make_array_from_process_local_data(placed, value)
            placed.shard_shape(value.shape)
        except ValueError as error:
            name = jax.tree_util.keystr(path) or "the batch"
            raise ConfigError(
                f"{name}: got shape {value.shape}; accepted: one that {spec} over the mesh {dict(sharding.mesh.shape)} "
                f"divides ({str(error).partition(chr(10))[0][:120]})"
            ) from None
        return jax.make_array_from_callback(value.shape, placed, lambda index: value[index])

    return jax.tree_util.tree_map_with_path(one, batch)


def batch_axes(mesh: Mesh | None = None, accumulate: int = 1) -> NamedSharding:
    """The `Recipe.batch_sharding` that splits a batch's rows over the row axes of `mesh`; without one, over
    all devices of all processes."""
    if mesh is None:
        mesh = make_mesh({"data": jax.device_count()})
    rows = tuple(name for name in ROWS if name in mesh.axis_names) or None
    return NamedSharding(mesh, PartitionSpec(rows) if accumulate == 1 else PartitionSpec(None, rows))


def output_shardings(state: Any) -> Any:
    """What `train_step` is held to: the state stays as it lies, the metrics are everywhere. None on one device."""
    mesh = mesh_of(state)
    if mesh is None:
        return None
    return jax.tree.map(lambda leaf: leaf.sharding, state), NamedSharding(mesh, PartitionSpec())


def agree(save: bool, stop: bool) -> tuple[bool, bool]:
    """Whether to save, by the clock of process 0, and to stop, as any process was asked to; the same in all of them."""
    if jax.process_count() == 1:
        return save, stop
    from jax.experimental import multihost_utils

    told = np.asarray(multihost_utils.process_allgather(np.array([save, stop], np.int32)))
    return bool(told[0, 0]), bool(told[:, 1].any())


def wait_for_all(name: str) -> None:
    """Returns when all processes have come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
