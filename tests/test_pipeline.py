"""The facade: what may be given, where values come from, and how parts are put together."""

from __future__ import annotations

import json
import math
import shutil
import warnings

import pytest
import torch
from oracles import greedy, raw_logits, tokens_of

from llama_infer import DEFAULT_PROCESSORS, Message, Param, Pipeline, Request, installed, register, transform_logits
from llama_infer.errors import ParameterError, PartError, UnknownParameterError, UnknownPartError, UnsupportedError
from llama_infer.testing import byte_tokenizer, tiny_llama


@pytest.fixture(scope="module")
def chatty():
    """A pipeline that formats as a chat."""
    return Pipeline(tiny_llama(), tokenizer=byte_tokenizer(), params={"max_new_tokens": 4, "temperature": 0})


def test_one_prompt_or_many(chatty, pipe):
    """A string, ids or messages are one prompt; any other list is a list of prompts, answered in order."""
    messages = [{"role": "user", "content": "hi"}]
    for prompt in ("hi", [1, 2], (1, 2), torch.tensor([1, 2]), messages, [Message("user", "hi")]):
        one, (same,) = chatty(prompt), chatty([prompt])
        assert one.prompt_token_ids == same.prompt_token_ids and one.token_ids == same.token_ids
    mixed = chatty(["hi", [1, 2], messages])
    assert [answer.prompt_token_ids for answer in mixed] == [
        chatty(prompt).prompt_token_ids for prompt in ("hi", [1, 2], messages)
    ]
    assert mixed[1].prompt_token_ids == (1, 2)
    assert mixed[0].prompt_token_ids != mixed[2].prompt_token_ids  # a text gets the default system prompt
    assert pipe("hi").prompt_token_ids == (256, *b"hi")
    assert [answer.prompt_token_ids for answer in pipe([[1], [2, 3]])] == [(1,), (2, 3)]


def test_a_list_value_is_one_a_prompt(pipe):
    prompts = [[1], [2], [3]]
    spread = {"temperature": [0.0, 0.5, 2.0], "seed": [3, 4, 5], "max_new_tokens": (2, 3, 4)}
    spread["top_k"] = torch.tensor([9, 0, 4])
    answers = pipe(prompts, **spread)
    for row, answer in enumerate(answers):
        own = {name: values[row] for name, values in spread.items()}
        assert answer.token_ids == pipe(prompts[row], **own).token_ids
    assert [len(answer.token_ids) for answer in answers] == [2, 3, 4]


def test_a_list_of_strings_is_one_value_and_lists_of_lists_are_many(pipe):
    """``stop`` is sequence-valued: a flat list counts for every prompt."""
    flat = pipe([[1], [2]], stop=["x", "y"])
    assert [answer.request.params["stop"] for answer in flat] == [["x", "y"]] * 2
    nested = pipe([[1], [2]], stop=[["x"], []], logit_bias=[{1: 1.0}, {}])
    assert [answer.request.params["stop"] for answer in nested] == [["x"], []]
    assert [answer.request.params["logit_bias"] for answer in nested] == [{1: 1.0}, {}]


def test_one_seed_for_a_list_gives_equal_prompts_equal_answers(pipe):
    same = pipe([[1, 2]] * 3, seed=5)
    assert len(set(tokens_of(same))) == 1
    assert len(set(tokens_of(pipe([[1, 2]] * 3, seed=[5, 6, 7])))) == 3
    many = pipe([1, 2], n=3, seed=5)
    assert many.token_ids == same[0].token_ids and len(set(tokens_of([many, *many.alternatives]))) == 3


def test_streams_add_up(pipe):
    """Text and tokens of the chunks are the completion's; with n, each sample's."""
    whole = pipe("Hello", seed=1, n=3)
    chunks = list(pipe.stream("Hello", seed=1, n=3))
    for index, answer in enumerate([whole, *whole.alternatives]):
        own = [chunk for chunk in chunks if chunk.index == index]
        assert "".join(chunk.text for chunk in own) == answer.text
        assert tuple(token for chunk in own for token in chunk.token_ids) == answer.token_ids
        assert [chunk.finish_reason for chunk in own if chunk.finish_reason] == [answer.finish_reason]


def test_logprobs_are_the_models_own(pipe, reference):
    """Of the chosen tokens always, of the likeliest when asked; against log_softmax of an unpadded forward."""
    answers = pipe([[5, 6], [7, 8, 9]], temperature=1.7, top_k=40, repetition_penalty=1.3, logprobs=[0, 4], seed=2)
    for answer in answers:
        logits = raw_logits(reference, [*answer.prompt_token_ids, *answer.token_ids])
        expected = logits[len(answer.prompt_token_ids) - 1 : -1].log_softmax(-1)
        chosen = expected.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
        assert answer.logprobs == pytest.approx(chosen.tolist(), abs=1e-4)
        if answer.top_logprobs:
            best = expected.topk(4)
            assert [[top.token_id for top in tops] for tops in answer.top_logprobs] == best.indices.tolist()
            values = torch.tensor([[top.logprob for top in tops] for tops in answer.top_logprobs])
            torch.testing.assert_close(values, best.values, rtol=0, atol=1e-4)
    assert [len(answer.top_logprobs) for answer in answers] == [0, len(answers[1].token_ids)]


def test_where_values_come_from():
    """Call over pipeline over checkpoint over default; ``explain`` says which, and the run does as it says."""
    model = tiny_llama()
    model.generation_config.top_p, model.generation_config.top_k = 0.8, 7
    model.generation_config.max_new_tokens = 5
    pipe = Pipeline(model, params={"top_k": 9, "min_p": 0.1})
    told = pipe.explain(min_p=0.2)
    assert {name: (told[name].value, told[name].origin) for name in ("min_p", "top_k", "top_p", "temperature")} == {
        "min_p": (0.2, "call"),
        "top_k": (9, "pipeline"),
        "top_p": (0.8, "checkpoint"),
        "temperature": (1.0, "default"),
    }
    assert set(told) == set(pipe.declared) and "0.2  (call)" in str(told)
    explicit = {name: setting.value for name, setting in told.items()}
    bare = Pipeline(tiny_llama())
    assert pipe([1], seed=1, min_p=0.2).token_ids == bare([1], **{**explicit, "seed": 1}).token_ids
    assert len(pipe([1], seed=1).token_ids) == 5


def test_a_checkpoints_file(tmp_path):
    """``do_sample=False`` is temperature 0; fields that nobody knows are ignored; the folder's end tokens stop."""
    from checkpoints import write_checkpoint

    folder = write_checkpoint(tmp_path / "model")
    fields = {"do_sample": False, "temperature": 0.6, "eos_token_id": [65, 257], "novel_field": 3, "num_beams": 1}
    (folder / "generation_config.json").write_text(json.dumps(fields))
    pipe = Pipeline(folder, dtype="float32", params={"max_new_tokens": 5})
    assert (pipe.explain()["temperature"].value, pipe.explain()["temperature"].origin) == (0.0, "checkpoint")
    assert {65, 257, 260} <= set(pipe.loaded.end_token_ids)
    assert pipe([1, 2]).token_ids == greedy(tiny_llama(), [1, 2], 5, eos_token_id=[65, 257, 260])
    assert pipe("x", temperature=0.5).finish_reason in ("stop", "length")


def generation_config(**fields):
    from transformers import GenerationConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return GenerationConfig(**fields)


def test_a_generation_config_in_place_of_parameters(pipe):
    """In a call, a request, a pipeline; beside parameters, which count more."""
    config = generation_config(do_sample=True, temperature=0.7, top_k=9, max_new_tokens=5, stop_strings=["zz"])
    params = {"temperature": 0.7, "top_k": 9, "max_new_tokens": 5, "stop": ["zz"]}
    expected = pipe([1], seed=3, **params).token_ids
    assert pipe([1], config, seed=3).token_ids == expected
    assert list(pipe.stream([1], config, seed=3))[-1].finish_reason == "length"
    assert pipe.replace(params=config)([1], seed=3).token_ids == expected
    assert pipe.explain(config, top_k=4)["top_k"].value == 4 and pipe.explain(config)["stop"].value == ("zz",)
    assert len(next(pipe.run([Request([1], config)])).token_ids) == 5
    cold = generation_config(do_sample=False, temperature=0.7)
    assert pipe([1], cold).token_ids == pipe([1], temperature=0).token_ids
    assert len(pipe([1], generation_config(num_return_sequences=2, do_sample=True)).alternatives) == 1


@pytest.mark.parametrize(
    "field, value",
    [("num_beams", 4), ("typical_p", 0.5), ("no_repeat_ngram_size", 3), ("guidance_scale", 2.0), ("max_length", 99)],
)
def test_a_field_that_cannot_be_honoured_is_named(pipe, field, value):
    without = [part for part in DEFAULT_PROCESSORS if part not in ("typical_p", "no_repeat_ngram_size")]
    bare = pipe.replace(processors=without)
    with pytest.raises(UnsupportedError, match=f"GenerationConfig.{field}="):
        bare([1], generation_config(do_sample=True, **{field: value}))
    with pytest.raises(UnsupportedError, match=field):
        bare.replace(params=generation_config(**{field: value}))


def test_replace_shares_the_model(pipe):
    other = pipe.replace(sampler="greedy", params={"max_new_tokens": 3})
    assert other.loaded is pipe.loaded and len(other([1]).token_ids) == 3
    assert pipe.explain()["max_new_tokens"].value == 12  # and leaves the first as it was
    with pytest.raises(UnknownParameterError, match="did you mean 'sampler'"):
        pipe.replace(samplr="greedy")


def test_repr_prints_the_chain(pipe):
    def halve(logits, batch):
        return logits / 2

    shown = repr(pipe.replace(processors=("top_k", halve, "temperature")))
    assert "chain: top_k -> halve -> temperature -> categorical" in shown and "end, length, text" in shown


def test_processors_slot_forms(pipe):
    """None, a name, one callable, a tuple of both; a plug-in is neutral to nobody and order counts."""

    def only(token):
        return lambda logits, batch: logits.masked_fill(torch.arange(264) != token, -math.inf)

    assert pipe.replace(processors=only(7))([1]).token_ids == (7,) * 12
    assert pipe.replace(processors=(only(8), *DEFAULT_PROCESSORS))([1], top_k=3, temperature=0.1).token_ids == (8,) * 12
    assert pipe.replace(processors="top_k")([1], top_k=1).token_ids == pipe([1], temperature=0).token_ids
    bare = pipe.replace(processors=None)
    assert "top_k" not in bare.declared and bare([1], seed=1).token_ids == pipe([1], seed=1).token_ids
    with pytest.raises(UnknownParameterError, match="top_k"):
        bare([1], top_k=3)
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    halved = transform_logits(logits, processors=(lambda x, batch: x / 2, "temperature"), temperature=0.5)
    torch.testing.assert_close(halved, logits)


def test_a_part_of_a_users(pipe):
    """The ten lines of the documentation: a sampler with a parameter of its own, neutral until it is set."""

    class EpsilonGreedy:
        params = {"epsilon": Param(default=0.1, check=lambda v: 0 <= v <= 1, range="0 <= epsilon <= 1")}

        def __call__(self, logits, batch):
            ids = torch.arange(logits.shape[-1])
            explore = (logits - (-batch.uniform("epsilon.noise", ids).log()).log()).argmax(-1)
            return torch.where(batch.uniform("epsilon.coin") < batch["epsilon"], explore, logits.argmax(-1))

    own = pipe.replace(sampler=EpsilonGreedy())
    cold, warm = own([[1], [1]], epsilon=[0.0, 1.0], seed=3)
    assert cold.token_ids == pipe([1], temperature=0).token_ids != warm.token_ids
    with pytest.raises(ParameterError, match="0 <= epsilon <= 1"):
        own([1], epsilon=2)


def test_two_parts_share_a_parameter_only_if_they_declare_it_alike(pipe):
    class Other:
        params = {"top_k": Param(default=5, neutral=0)}

        def __call__(self, logits, batch):
            return logits

    with pytest.raises(ParameterError, match="top_k"):
        pipe.replace(processors=(*DEFAULT_PROCESSORS, Other()))


def test_registered_parts(pipe, monkeypatch):
    from llama_infer import registry

    monkeypatch.setattr(registry, "_registered", {})

    @register("sampler", "always_seven")
    class Seven:
        def __call__(self, logits, batch):
            return torch.full_like(batch.length, 7)

    assert pipe.replace(sampler="always_seven")([1]).token_ids == (7,) * 12
    assert ("sampler", "always_seven") in {(part.kind, part.name) for part in installed()}
    register("sampler", "always_seven")(Seven)  # the same again is no clash
    with pytest.raises(PartError, match="'greedy' exists already"):
        register("sampler", "greedy")(Seven)
    with pytest.raises(PartError, match="did you mean 'sampler'"):
        register("samplers", "x")


def test_an_unknown_part_suggests_the_nearest(pipe):
    with pytest.raises(UnknownPartError, match="unknown sampler 'gredy'; did you mean 'greedy'.*categorical"):
        pipe.replace(sampler="gredy")
    with pytest.raises(UnknownPartError, match="did you mean 'top_k'"):
        pipe.replace(processors=("topk",))
    with pytest.raises(PartError, match="3 is no processor"):
        pipe.replace(processors=(3,))


class Doubling:
    """What an entry point brings."""

    def __call__(self, logits, batch):
        return logits * 2


@pytest.fixture
def installed_plugin(tmp_path, monkeypatch):
    """A distribution, installed while this process runs, that brings three processors."""
    info = tmp_path / "extra_parts-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: extra-parts\nVersion: 1.0\n")
    points = f"doubling = {__name__}:Doubling\nbroken = no_such_module:X\ntop_k = {__name__}:Doubling\n"
    (info / "entry_points.txt").write_text(f"[llama_infer.processors]\n{points}")
    monkeypatch.syspath_prepend(tmp_path)
    return info


def test_entry_points(pipe, installed_plugin, monkeypatch):
    assert "Doubling" in repr(pipe.replace(processors="doubling"))
    assert {part.name for part in installed()} >= {"doubling", "broken"}
    with pytest.raises(PartError, match="'broken' of extra-parts.*cannot be imported"):
        pipe.replace(processors="broken")
    with pytest.raises(PartError, match="several parts claim.*'top_k'.*llama-infer"):
        pipe.replace(processors="top_k")
    monkeypatch.setenv("LLAMA_INFER_PLUGINS", "0")
    assert pipe.replace(processors="top_k") is not None
    with pytest.raises(UnknownPartError, match="doubling"):
        pipe.replace(processors="doubling")
    monkeypatch.delenv("LLAMA_INFER_PLUGINS")
    shutil.rmtree(installed_plugin)
    with pytest.raises(UnknownPartError, match="doubling"):
        pipe.replace(processors="doubling")


def test_transformers_processors_in_the_slot(pipe, reference):
    """Against transformers' ``generate`` with the same object, one row at a time; a list of them too."""
    import transformers as hf

    class Memory(hf.LogitsProcessor):
        """Bans what it saw as likeliest before: keeps rows apart only if each has a copy."""

        def __init__(self) -> None:
            self.seen: list[int] = []

        def __call__(self, input_ids, scores):
            scores = scores.clone()
            scores[:, self.seen] = -math.inf
            self.seen.append(int(scores.argmax()))
            return scores

    prompts = [[1, 2, 1, 2, 1], [4, 5], [7, 7, 7, 7]]
    ends = list(pipe.loaded.end_token_ids)
    listed = hf.LogitsProcessorList([hf.NoRepeatNGramLogitsProcessor(2), hf.TopKLogitsWarper(9)])
    for make in (lambda: hf.NoRepeatNGramLogitsProcessor(2), Memory, lambda: listed):
        given = make()
        adapted = pipe.replace(processors=(given, *DEFAULT_PROCESSORS))
        assert f"note: {type(given).__name__} is transformers' own: it costs a call a row" in repr(adapted)
        answers = adapted(prompts, temperature=0)
        for prompt, answer in zip(prompts, answers, strict=True):
            own = make()
            alike = own if isinstance(own, list) else hf.LogitsProcessorList([own])
            assert answer.token_ids == greedy(reference, prompt, 12, eos_token_id=ends, logits_processor=alike)
        assert not getattr(given, "seen", [])


def test_a_transformers_processor_sees_its_rows_tokens_and_scores():
    """Unpadded, and its result is taken as it is: the same numbers as by hand."""
    import transformers as hf

    logits, histories = torch.randn(3, 9), [[1, 2, 2], [3], [8, 1]]
    for processor in (hf.RepetitionPenaltyLogitsProcessor(1.7), hf.TemperatureLogitsWarper(0.5)):
        scores = transform_logits(logits, tokens=histories, processors=(processor,))
        for row, history in enumerate(histories):
            assert torch.equal(scores[row : row + 1], processor(torch.tensor([history]), logits[row : row + 1]))


def test_transformers_processors_that_are_bound_to_a_batch_are_refused(pipe):
    import transformers as hf

    bound = [
        hf.MinNewTokensLengthLogitsProcessor(3, 4, 257),
        hf.ExponentialDecayLengthPenalty((3, 1.1), 257, 4),
        hf.SuppressTokensAtBeginLogitsProcessor([1], 3),
        hf.PrefixConstrainedLogitsProcessor(lambda row, ids: [1], 1),
        hf.UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, pipe.loaded.model),
    ]
    for processor in bound:
        for given in (processor, hf.LogitsProcessorList([processor])):
            with pytest.raises(UnsupportedError, match=type(processor).__name__):
                pipe.replace(processors=(given,))
    with pytest.raises(UnsupportedError, match="min_new_tokens"):
        pipe.replace(processors=bound[0])


def test_a_list_of_lists_is_one_value_where_the_parameter_takes_it(pipe):
    """``bad_words_ids`` is a list of lists itself; a list of those is one a prompt."""
    from transformers import GenerationConfig

    banned = pipe("abc", temperature=0, max_new_tokens=1).token_ids[0]
    assert pipe("abc", temperature=0, max_new_tokens=1, bad_words_ids=[[banned]]).token_ids[0] != banned
    first, second = pipe(["abc", "abc"], temperature=0, max_new_tokens=1, bad_words_ids=[[[banned]], []])
    assert first.token_ids[0] != banned == second.token_ids[0]
    config = GenerationConfig(bad_words_ids=[[banned]], max_new_tokens=1, do_sample=False)
    assert pipe("abc", config).token_ids[0] != banned
