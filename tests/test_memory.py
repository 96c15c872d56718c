"""What fits is planned; where memory runs out anyway: fewer rows, the same output."""

from __future__ import annotations

import logging
import os
from types import SimpleNamespace

import pytest
import torch
from oracles import completions, drain, open_engine, random_prompts, requests, streamed, tokens_of
from test_engine import count_fed
from test_packed import make
from transformers import RepetitionPenaltyLogitsProcessor

from llama_infer import DEFAULT_PROCESSORS, Pipeline, Request
from llama_infer.engine.memory import is_out_of_memory
from llama_infer.errors import InsufficientMemoryError, LoadingError
from llama_infer.models import memory as plans
from llama_infer.testing import tiny_llama

ERRORS = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you"
    ),
    "python": MemoryError(),
}


class Scarce:
    """A hook on a model: memory runs out in the forwards of these numbers, or in those of too many tokens."""

    def __init__(self, pipe, at=(), tokens=1 << 30, error="cuda", where=1):
        self.calls, self.failed, self.at, self.tokens, self.error = 0, 0, set(at), tokens, ERRORS[error]
        self.held = 0
        layer = pipe.loaded.model.model.layers[where]
        self._hooks = [
            pipe.loaded.model.register_forward_pre_hook(self._count, with_kwargs=True),
            layer.register_forward_hook(self._fail),  # in the middle: half of the layers have their keys and values
        ]

    def _count(self, module, args, kwargs):
        self.calls += 1
        self.fed = kwargs["input_ids"].numel()

    def _fail(self, module, args, output):
        if self.calls in self.at or self.fed > self.tokens:
            self.failed += 1
            raise self.error

    def __enter__(self):
        return self

    def __exit__(self, *args):
        for hook in self._hooks:
            hook.remove()


@pytest.fixture(params=[None, 5], ids=["whole", "chunked"])
def chunk(request):
    return request.param


def served(pipe, asked, chunk=None):
    engine = open_engine(pipe, chunk)
    for request in asked:
        engine.add(request)
    events = drain(engine)
    return completions(events), events


@pytest.mark.parametrize("cache, error", [("slots", "cuda"), ("slots", "cpu"), ("plain", "python")])
def test_the_output_is_that_of_an_undisturbed_run(pipe, chunk, cache, error):
    """Some forwards fail in their middle: sampled, penalised, with state columns, stops and several samples."""
    foreign = RepetitionPenaltyLogitsProcessor(1.1)
    pipe = pipe.replace(cache=cache, processors=(*DEFAULT_PROCESSORS, foreign), batch_size=8)
    special = [{"mirostat": 2}, {"stop": ["e"]}, {"dry_multiplier": 0.8}] * 2
    asked = [
        Request(prompt, {"seed": at, "temperature": 0.9, "n": 1 + at % 3, **special[at]}, id=str(at))
        for at, prompt in enumerate(random_prompts(6, seed=4, longest=30))
    ]
    expected, _ = served(pipe, asked, chunk)
    with Scarce(pipe, [9, 12] if cache == "slots" else [9, 30], error=error) as scarce:
        found, events = served(pipe, asked, chunk)
    assert scarce.failed == 2
    for id, answer in expected.items():
        assert found[id].error is None
        for index, (one, other) in enumerate(
            zip((found[id], *found[id].alternatives), (answer, *answer.alternatives), strict=True)
        ):
            assert (one.token_ids, one.text, one.finish_reason) == (other.token_ids, other.text, other.finish_reason)
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
            assert streamed(events, id, index) == (one.text, one.token_ids)


def test_the_batch_is_halved_until_it_fits(pipe, caplog):
    """Forwards of more than five tokens fail: five rows or fewer are decoded at once, and it is said."""
    asked = requests([[at] for at in range(20)], min_new_tokens=12)
    expected = tokens_of(pipe.run(asked))
    with Scarce(pipe, tokens=5) as scarce, caplog.at_level(logging.WARNING, "llama_infer"):
        assert tokens_of(pipe.replace(batch_size=20).run(asked)) == expected
    assert scarce.failed == 2 and [record.message for record in caplog.records] == [
        "memory ran out: the batch is reduced to 10 rows",
        "memory ran out: the batch is reduced to 5 rows",
    ]


def test_long_prompts_are_fed_in_smaller_pieces(pipe):
    prompt = [at % 250 for at in range(300)]
    expected = pipe(prompt, seed=1).token_ids
    with Scarce(pipe, tokens=100):
        fed, hook = count_fed(pipe)
        assert pipe.replace(prefix_cache=0)(prompt, seed=1).token_ids == expected
        hook.remove()
    assert max(n for n in fed if n <= 100) > 50


def test_a_request_that_does_not_fit_alone_fails_alone(pipe):
    """The others are served."""
    long = [at % 250 for at in range(300)]
    answers = {}
    with Scarce(pipe, tokens=40):
        for answer in pipe.replace(batch_size=3).run([Request([1], {"seed": 1}), Request(long), Request([2])]):
            answers[answer.prompt_token_ids[0], len(answer.prompt_token_ids)] = answer
    assert isinstance(answers[0, 300].error, InsufficientMemoryError) and "alone" in str(answers[0, 300].error)
    assert answers[1, 1].token_ids == pipe([1], seed=1).token_ids and answers[2, 1].error is None


def test_a_preempted_request_can_be_cancelled(pipe):
    engine = open_engine(pipe)
    for request in requests([[1], [2], [3], [4]], min_new_tokens=12):
        engine.add(request)
    events = engine.step() + engine.step()
    with Scarce(pipe, at=[1]):
        events += engine.step()
    engine.cancel("3")
    events += drain(engine)
    done = completions(events)
    expected = pipe([4], seed=3, min_new_tokens=12)
    assert done["3"].finish_reason == "abort" and done["3"].token_ids == expected.token_ids[:2]
    assert streamed(events, "3") == (done["3"].text, done["3"].token_ids)
    assert done["2"].token_ids == pipe([3], seed=2, min_new_tokens=12).token_ids


def test_memory_that_runs_out_while_rows_move(pipe, monkeypatch):
    """Not in the forward but when the cache forks or drops rows, and when a prefix is kept."""
    own = pipe.replace()
    asked = requests(random_prompts(6, seed=2), n=3)
    expected = [tokens_of([a, *a.alternatives]) for a in pipe.run(asked)]
    cache = type(own._assembly.cache())
    for name in ("select", "copy", "paste"):
        original, calls = getattr(cache, name), []

        def scarce(self, *args, original=original, calls=calls):
            calls.append(1)
            if len(calls) % 3 == 1:
                raise MemoryError
            return original(self, *args)

        monkeypatch.setattr(cache, name, scarce)
        for _ in range(2):
            assert [tokens_of([a, *a.alternatives]) for a in own.run(asked)] == expected
        monkeypatch.undo()
        assert calls, name


def test_other_errors_are_not_taken_for_it():
    assert all(map(is_out_of_memory, ERRORS.values()))
    assert not any(map(is_out_of_memory, (RuntimeError("shape mismatch"), ValueError("out of memory"))))


def test_windows_in_float64():
    """Sliding windows, resumed exactly."""
    pipe = Pipeline(make("gemma3"), params={"max_new_tokens": 12, "temperature": 0}, batch_size=6)
    prompts = random_prompts(6, seed=3, longest=20)
    expected = tokens_of(pipe(prompts))
    with Scarce(pipe, at=[4, 9]) as scarce:
        assert tokens_of(pipe(prompts)) == expected
    assert scarce.failed == 2


def test_a_pipeline_without_prefixes(tokenizer):
    pipe = Pipeline(tiny_llama(), tokenizer=tokenizer, prefix_cache=0, params={"max_new_tokens": 9}, formatter="plain")
    expected = tokens_of(pipe([[1], [2], [3]], seed=1))
    with Scarce(pipe, at=[3]):
        assert tokens_of(pipe([[1], [2], [3]], seed=1)) == expected


GB = 10**9


@pytest.fixture
def memory(monkeypatch):
    """Sets how many bytes are free."""

    def set_free(count):
        monkeypatch.setattr(plans, "free_memory", lambda device: count)

    return set_free


def test_bytes_of_a_token():
    """Against what the cache of a model really holds."""
    for kind in ("qwen3", "gemma3"):
        model = make(kind)
        cache = model(torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values
        held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
        assert plans.token_bytes(model.config.to_dict(), 8) == held / 3
    assert plans.token_bytes({"hidden_size": 2048, "num_hidden_layers": 16, **heads(32, 8)}, 2) == 32 * 1024
    assert plans.token_bytes({"model_type": "mamba"}, 2) == 0


def heads(query, key_value):
    return {"num_attention_heads": query, "num_key_value_heads": key_value}


def test_the_batch_that_fits_is_chosen_and_said(pipe, memory):
    """tiny: 2 layers x 2 heads x 8 dimensions x keys and values x 4 bytes = 256 bytes a token, and room to double."""
    memory(512 * 512 * 20 / 0.9 + 1)
    small = pipe.replace(batch_size=32)
    assert small._assembly.batch_size == 20 and small._assembly.cache_tokens == 512 * 20
    assert small.notes == ("batch_size is 20, not 32: 5.8 MB are free for keys and values",)
    assert small.notes[0] in repr(small)
    assert tokens_of(small([[1], [2]], seed=1)) == tokens_of(pipe([[1], [2]], seed=1))
    assert pipe.replace(batch_size=20).notes == ()
    memory(None)
    assert pipe.replace(batch_size=500)._assembly.batch_size == 500
    memory(512 * 512)
    with pytest.raises(InsufficientMemoryError, match="one row of 512 tokens need"):
        pipe.replace()


def test_what_is_remembered_is_a_part_of_what_fits(pipe, memory):
    memory(512 * 8192 / 0.9 + 1)
    assert pipe.replace()._assembly.prefixes.capacity == 8192 // 4


def test_rows_are_admitted_by_the_tokens_that_they_may_come_to_hold(pipe, memory):
    """Room for 1,024 tokens: two rows of 500, or many short ones."""
    memory(512 * 1024 / 0.9 + 1)
    small = pipe.replace(batch_size=20, prefix_cache=0)
    assert small._assembly.batch_size == 2
    engine = open_engine(small)
    engine._scheduler.batch_size, engine._scheduler.idle_chunk = 20, 1024  # both prompts in one step
    lengths = [490] * 3 + [5] * 10
    for at, length in enumerate(lengths):
        engine.add(Request([at] * length, {"max_new_tokens": 10, "min_new_tokens": 10}, id=str(at)))
    live = []
    while engine.busy:
        engine.step()
        rows = engine._rows
        assert len(rows) * max((len(row.prompt_token_ids) + 10 for row in rows), default=0) <= 1024
        live.append(len(rows))
    assert live[:20].count(2) == 18 and live[20:].count(9) == 9, live


def test_weights_that_do_not_fit_are_not_read(tmp_path, memory, monkeypatch):
    """Refused in one line, with the sizes; a policy that shrinks them may go on; device_map places them itself."""
    from llama_infer.models import loaders

    monkeypatch.setattr(loaders, "load_model", lambda *args: pytest.fail("weights were read"))
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    bytes = sum(4 * parameter.numel() for parameter in model.parameters())
    memory(bytes + 512 * 256 - 1)
    with pytest.raises(
        LoadingError, match=r"does not fit: its weights are .* in float32, .* are free on cpu"
    ) as caught:
        Pipeline(tmp_path, dtype="float32", device="cpu")
    assert "\n" not in str(caught.value)
    for options in ({"dtype": "bfloat16"}, {"dtype": "float32", "quantization": "bnb-nf4"}, {"device_map": "auto"}):
        with pytest.raises(pytest.fail.Exception, match="weights were read"):
            Pipeline(tmp_path, **options)
    memory(bytes + 512 * 256)
    with pytest.raises(pytest.fail.Exception, match="weights were read"):
        Pipeline(tmp_path, dtype="float32", device="cpu")


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_is_what_the_machine_and_the_groups_leave(tmp_path, monkeypatch, version):
    """The least of the machine's and of every limit on the way up, the droppable file cache included."""
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    monkeypatch.setattr(plans, "_PROC", proc)
    monkeypatch.setattr(plans, "_CGROUPS", groups)
    cpu = torch.device("cpu")
    inner = groups / ("memory/a/b" if version == 1 else "a/b")
    inner.mkdir(parents=True)
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9000000 kB\nMemAvailable:    8000000 kB\n")
    (proc / "self/cgroup").write_text("4:cpuset:/x\n5:memory:/a/b\n" if version == 1 else "0::/a/b\n")
    limit, used = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    )
    files = "total_inactive_file" if version == 1 else "inactive_file"
    assert plans.free_memory(cpu) == 8000000 * 1024
    (inner / limit).write_text("max\n")
    assert plans.free_memory(cpu) == 8000000 * 1024
    for folder, most in ((inner, 6 * GB), (inner.parent, 5 * GB)):
        (folder / limit).write_text(f"{most}\n")
        (folder / used).write_text(f"{2 * GB}\n")
        (folder / "memory.stat").write_text(f"anon 1\n{files} {GB}\n")
        assert plans.free_memory(cpu) == most - GB
    (proc / "meminfo").unlink()
    assert plans.free_memory(cpu) == 4 * GB
    assert plans.free_memory(torch.device("mps")) is None


def test_free_memory_of_this_machine():
    assert 0 < plans.free_memory(torch.device("cpu")) < 1 << 50


@pytest.mark.parametrize("variable, expected", [("MALLOC_ARENA_MAX", []), ("OTHER", [(-3, 64 << 20), (-1, 256 << 20)])])
def test_malloc_is_told_to_keep_memory_unless_the_user_has_a_say(monkeypatch, variable, expected):
    from llama_infer.engine import memory

    told = []
    for name in list(os.environ):
        if name.startswith(("MALLOC_", "GLIBC_TUNABLES")):
            monkeypatch.delenv(name)
    monkeypatch.setenv(variable, "1")
    monkeypatch.setattr(memory.sys, "platform", "linux")
    library = SimpleNamespace(mallopt=lambda *setting: told.append(setting))
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: library)
    memory.keep_freed_memory()
    assert told == expected
    del library.mallopt  # musl
    memory.keep_freed_memory()
