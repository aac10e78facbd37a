"""Streaming: blocks come in order within a budget, and a model whose layers are streamed is the model in memory."""

import ctypes
import dataclasses
import functools
import json
import random
import runpy
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import decode, host_memory, quant
from jaxinfer.cache.retrieval import Asking
from jaxinfer.cli import compiled, main
from jaxinfer.errors import CheckpointError, ConfigError
from jaxinfer.models import ModelConfig, Step
from jaxinfer.models.hf import load_directory, save_directory
from jaxinfer.sharding import host_weights
from jaxinfer.sharding.layer_reader import Reader
from jaxinfer.sharding.layer_stream import LayerFiles
from jaxinfer.sharding.rules import TENSOR
from jaxinfer.sharding.streamer import Block, Streamer

HERE = Path(__file__).parent
write_checkpoint = runpy.run_path(str(HERE / "test_hf_goldens.py"))["write_checkpoint"]
FAMILIES = ("gemma3", "mixtral", "phi3")
LLAMA = ModelConfig(
    vocab_size=96, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, mlp_size=64, max_length=64
)
LAYERS = [(r"layers_\d+/(attention|mlp)/(?!.*(norm|bias)).*", quant.Transposed())]


class Host:
    """Blocks of `sizes` whose loads take a moment; counts the bytes that are loaded and not released."""

    def __init__(self, sizes, seconds=0.0):
        self.held, self.most, self.lock, self.seconds = 0, 0, threading.Lock(), seconds
        self.blocks = [
            Block(f"block {i}", n, functools.partial(self.load, i, n), functools.partial(self.release, n))
            for i, n in enumerate(sizes)
        ]

    def load(self, index, size):
        with self.lock:
            self.held += size
            self.most = max(self.most, self.held)
        time.sleep(self.seconds)
        return [index]

    def release(self, size, contents):
        contents[0] = None  # whoever still reads it sees nothing
        with self.lock:
            self.held -= size


def test_blocks_come_in_order_round_and_round_within_the_budget():
    host = Host([5, 3, 8, 1, 2], seconds=0.001)
    with Streamer(host.blocks, budget=14, wrap=True) as streamer:
        taken = [streamer.take(i % 5)[0] for i in range(23)]
        assert taken == [i % 5 for i in range(23)]
        assert streamer.counts.peak <= 14
        assert 23 <= streamer.counts.loads <= 23 + 4  # each once, and the few ahead
    assert host.most <= 14
    assert host.held == 0


@pytest.mark.parametrize("bug", ["no budget", "early release"])
def test_planted_bug_in_the_streamer_is_seen(bug, monkeypatch):
    """A streamer that loads without a limit passes its budget; one that releases at once hands out what is gone."""
    host = Host([4] * 6, seconds=0.001)
    streamer = Streamer(host.blocks, budget=12, wrap=True)
    if bug == "no budget":
        streamer._budget = 24
    else:
        take = streamer.take
        monkeypatch.setattr(streamer, "take", lambda i: (take(i), streamer.release())[0])
    taken = [streamer.take(i % 6)[0] for i in range(12)]
    time.sleep(0.05)  # what is ahead arrives
    good = host.most <= 12 and taken == [i % 6 for i in range(12)]
    streamer.close()
    assert not good


def test_blocks_ahead_are_loaded_while_one_is_used():
    host = Host([1] * 8, seconds=0.02)
    with Streamer(host.blocks, budget=4, threads=2, wrap=True) as streamer:
        streamer.take(0)
        time.sleep(0.15)
        before = streamer.counts.waited
        for i in range(1, 4):
            streamer.take(i)
        assert streamer.counts.waited - before < 0.01  # three loads of 20 ms had been done before


def test_a_block_out_of_turn_is_served():
    """A program that is stopped in the middle of a forward begins the next one at the first layer."""
    host = Host([1] * 10)
    with Streamer(host.blocks, budget=3, wrap=True) as streamer:
        order = random.Random(0).choices(range(10), k=60)
        assert [streamer.take(i)[0] for i in order] == order
        assert streamer.counts.peak <= 3
    assert host.held == 0


def test_all_takers_are_waited_for():
    """Two devices at their own pace: a block stays until both are done with it."""
    host = Host([1] * 5)
    with Streamer(host.blocks, budget=2, wrap=True, takers=2) as streamer:
        seen = {0: [], 1: []}

        def device(number):
            generator = random.Random(number)
            for i in range(40):
                contents = streamer.take(i % 5, number)
                time.sleep(generator.random() * 0.002)
                seen[number].append(contents[0])

        threads = [threading.Thread(target=device, args=(n,)) for n in range(2)]
        [t.start() for t in threads]
        [t.join(20) for t in threads]
        assert seen == {0: [i % 5 for i in range(40)], 1: [i % 5 for i in range(40)]}
        assert streamer.counts.loads <= 41
    assert host.most <= 2


def test_an_error_of_a_load_is_the_takers_and_the_next_try_is_free():
    broken = [True]

    def load():
        if broken[0]:
            raise CheckpointError("unplugged")
        return [0]

    with Streamer([Block("a", 1, load), Block("b", 1, lambda: [1])], budget=2, wrap=True) as streamer:
        with pytest.raises(CheckpointError, match="unplugged"):
            streamer.take(0)
        broken[0] = False
        assert streamer.take(0) == [0]
        assert streamer.take(1) == [1]


def test_what_a_budget_must_hold():
    with pytest.raises(ConfigError, match="got 6 bytes, accepts 7 or more"):
        Streamer(Host([3, 4, 2]).blocks, budget=6)


def params_of(config):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(Step(config).init, jax.random.key(0))
    return jax.tree.map(
        lambda x: (rng.normal(0, 0.3, x.shape) if len(x.shape) > 1 else np.ones(x.shape)).astype(np.float32), shapes
    )


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    @functools.cache
    def get(name):
        directory = tmp_path_factory.mktemp("stream") / name
        if name == "llama":
            save_directory(LLAMA, params_of(LLAMA), directory)
            return directory
        write_checkpoint(json.loads((HERE / "goldens" / f"{name}.json").read_text()), directory)
        return directory

    return get


@functools.cache
def forward(step):
    """Logits, residual streams after the first and the last layer, what the cache notes, new keys and values."""

    def run(params, ids, positions):
        cache = step.new_cache(*ids.shape)
        cache = dataclasses.replace(cache, specs=tuple(Asking(spec) for spec in cache.specs))
        output, blocks = step(params, ids, positions, cache, taps=(0, step.config.num_layers - 1))
        return step.head(params, output.hidden), output.taps, output.notes, blocks

    return jax.jit(run)


def inputs(config):
    ids = jax.random.randint(jax.random.key(1), (2, 6), 1, config.vocab_size)
    return ids, jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32), (2, 6))


def tight(directory, **options):
    """The layers under the smallest budget that is accepted."""
    with pytest.raises(ConfigError, match="accepts") as refused:
        LayerFiles(directory, budget=1, **options)
    least = int(str(refused.value).split("accepts ")[1].split()[0])
    return LayerFiles(directory, budget=least, **options)


@pytest.mark.parametrize("name", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES)])
def test_streamed_logits_are_those_of_the_model_in_memory(name, directories):
    """Bit for bit, with fused tensors, experts, sandwich norms and sliding windows; so is all that a layer hands on."""
    config, params = load_directory(directories(name))
    params = quant.apply(params, LAYERS) if name != "mixtral" else params
    layers = tight(directories(name))
    ids, positions = inputs(config)
    expected = forward(Step(config))(params, ids, positions)
    found = forward(layers.step())(layers.resident(), ids, positions)
    layers.close()
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if name == "mixtral":  # its attention stands the other way round in memory here
            np.testing.assert_allclose(a, b, atol=2e-6, rtol=2e-6)
        else:
            np.testing.assert_array_equal(a, b)


def test_layers_in_the_wrong_order_are_seen(directories, monkeypatch):
    """The planted bug: every layer is given the weights of the first."""
    config, params = load_directory(directories("llama"))
    load = Reader.load
    monkeypatch.setattr(Reader, "load", lambda self, index: load(self, 0))
    layers = tight(directories("llama"))
    ids, positions = inputs(config)
    found = forward(layers.step())(layers.resident(), ids, positions)
    layers.close()
    expected = forward(Step(config))(quant.apply(params, LAYERS), ids, positions)
    assert np.abs(found[0] - expected[0]).max() > 1e-3


@pytest.mark.parametrize("bug", [False, True])
def test_the_program_has_and_holds_one_layer(bug, directories, monkeypatch):
    """Layers of one kind are one loop, with room for one layer. Written out one by one, their code grows with them."""
    if bug:
        monkeypatch.setattr(LayerFiles, "kind", lambda self, i: i)
    layers = tight(directories("llama"))
    step, params = layers.step(), layers.resident()
    lowered = forward(step).lower(params, *inputs(layers.config))
    memory = None if bug else lowered.compile().memory_analysis()
    layer = sum(leaf.nbytes for leaf in layers._layers[0])
    layers.close()
    assert lowered.as_text().count("python_cpu_callback") == (layers.config.num_layers if bug else 1)
    assert layers.config.num_layers >= 2
    assert memory is None or memory.temp_size_in_bytes < 1.6 * layer


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library has no malloc_trim")
def test_memory_that_compiling_left_is_given_back():
    """Small pieces that are free below one in use: the C library keeps them, as it does those of a compiler."""

    def resident():
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("RssAnon:")[1].split()[0])

    pieces = [np.ones(20_000, np.uint8) for _ in range(2_000)]
    del pieces[:-1]
    before = resident()
    host_memory.give_back()
    assert before - resident() > 20e6
    assert pieces[0].all()


@pytest.fixture(scope="module")
def decoded(directories):
    """`generate` of a sampled, ragged batch with drafts, in memory and streamed."""
    config, params = load_directory(directories("llama"))
    prompts = jax.random.randint(jax.random.key(2), (3, 9), 1, config.vocab_size)
    lengths, key = jnp.asarray([9, 4, 6]), jax.random.key(3)
    settings = decode.Config(max_tokens=16, temperature=0.7, drafter=decode.CopySpec(gamma=2))
    generate = jax.jit(decode.generate, static_argnames=("step", "config"))

    def run(step, params):
        return generate(step, params, prompts, lengths, config=settings, key=key)

    return run, run(Step(config), quant.apply(params, LAYERS))


def test_decoding_loops_take_a_streamed_model(decoded, directories):
    run, expected = decoded
    layers = tight(directories("llama"))
    found = run(layers.step(), layers.resident())
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.lengths, expected.lengths)
    forwards = int(found.stats.forwards.max())
    layers.close()
    assert layers.streamer.counts.loads >= layers.config.num_layers * forwards  # every forward reads every layer
    assert layers.streamer.counts.peak <= layers.streamer._budget


@pytest.mark.slow
def test_streamed_under_tensor_parallelism(decoded, directories):
    """Every device reads its own slices, and the tokens stay."""
    run, expected = decoded
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    layers = tight(directories("llama"), mesh=mesh, rules=TENSOR)
    found = run(layers.step(), layers.resident())
    layers.close()
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    whole = sum(leaf.nbytes for leaf in tight(directories("llama"))._layers[0])
    local = sum(leaf.nbytes for leaf in layers._layers[0])
    assert local < 0.6 * whole
    with pytest.raises(ConfigError, match="one of the two"):
        LayerFiles(directories("llama"), budget=10**9, mesh=mesh)


@pytest.mark.slow
def test_weights_in_host_memory(decoded, directories):
    run, expected = decoded
    config, params = load_directory(directories("llama"))
    params = host_weights.to_host(quant.apply(params, LAYERS))
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(params["layers_0"])}
    assert kinds == {"pinned_host"}
    assert params["embedding"].sharding.memory_kind == "device"
    found = run(host_weights.HostWeights(ahead=1).step(Step(config)), params)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    with pytest.raises(ConfigError, match="ahead: got -1"):
        host_weights.HostWeights(ahead=-1)
    with pytest.raises(ConfigError, match="memory kind 'attic'"):
        host_weights.to_host(params, kind="attic")


def test_host_weights_are_moved_one_layer_at_a_time(directories):
    """In the program a layer's move to the device waits for the layer before the last: without the order that
    `fetcher` gives, all moves could be made at once."""
    config, params = load_directory(directories("llama"))
    step = host_weights.HostWeights(ahead=1).step(Step(config))
    ids, positions = inputs(config)
    run = jax.make_jaxpr(lambda p: step(p, ids, positions)[0].hidden)(host_weights.to_host(params))
    names = [equation.primitive.name for equation in run.eqns]
    assert names.count("optimization_barrier") == config.num_layers
    moved = [equation for equation in run.eqns if equation.primitive.name == "device_put"]
    assert len(moved) >= config.num_layers  # every leaf, or all of a layer's at once


def test_tensors_in_one_piece_are_given_as_they_lie_in_the_file(directories):
    """Views of the file's map, no memory of the process; given back, they can be had again."""
    layers = tight(directories("llama"))
    first = layers._reader.load(1)
    expected = [array.copy() for array in first[1][0]]
    layers._reader.spare(first[0])
    (buffer, pieces), arrays = layers._reader.load(1)
    layers.close()
    assert buffer.nbytes == 0
    assert sum(nbytes for *_, nbytes in pieces) == sum(leaf.nbytes for leaf in layers._layers[1])
    assert not any(array.flags.owndata or array.flags.writeable for array in arrays[0])
    for array, copy in zip(arrays[0], expected, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_a_file_that_is_cut_while_in_use(tmp_path):
    directory = tmp_path / "cut"
    save_directory(LLAMA, params_of(LLAMA), directory)
    layers = tight(directory)
    layers.streamer.close()
    (file,) = directory.glob("*.safetensors")
    with file.open("r+b") as f:
        f.truncate(2000)
    with pytest.raises(CheckpointError, match="cut while in use"):
        for i in range(layers.config.num_layers):
            layers._reader.load(i)


def test_quantized_directories_are_refused(directories, tmp_path):
    config, params = load_directory(directories("llama"))
    save_directory(config, quant.apply(params, [(".*/mlp/.*", quant.Int8())]), tmp_path, leaves="native")
    with pytest.raises(ConfigError, match="only plain tensors"):
        LayerFiles(tmp_path, budget=10**9)


@pytest.mark.slow
def test_command_line(capsys, tiny_model, monkeypatch):
    """`--weights streamed` gives the answer that the model in memory gives, and says what is too little."""
    monkeypatch.setattr(compiled, "use_cache", lambda: None)
    command = ["generate", "--model", str(tiny_model), "--prompt", "def f(x):", "--max-tokens", "12"]
    assert main(command) == 0
    plain = capsys.readouterr().out
    assert main([*command, "--weights", "streamed:budget=1MB"]) == 0
    assert capsys.readouterr().out == plain
    for wrong, told in [
        ("streamed:budget=1KB", "got 1000 bytes, accepts"),
        ("streamed:budget=much", "got budget='much'"),
    ]:
        assert main([*command, "--weights", wrong]) == 2
        assert told in capsys.readouterr().err
