"""The adapter for lm-evaluation-harness: what it asks the model, what it keeps, how it goes on."""

import functools
import json
import types

import jax
import numpy as np
import pytest

from llada_jax import config as config_lib
from llada_jax import partitioning, tokenizer
from llada_jax.config import ConfigError
from llada_jax.diffusion import likelihood
from llada_jax.evaluation import answers, decode, harness
from llada_jax.model import transformer
from llada_jax.sampling.decoders import LowConfidence

BYTES = tokenizer.Bytes()
CAPITALS = {"France": "Paris", "Italy": "Rome", "Norway": "Oslo", "Spain": "Madrid", "Peru": "Lima"}


class StandIn:
    """Knows some capitals, and notes what it is asked. With `die_after` it fails after so many answers."""

    def __init__(self, knows=tuple(CAPITALS), die_after=None, settings=None, **fields):
        self.knows, self.die_after, self.asked, self.shapes = knows, die_after, [], []
        self.model = harness.Model(BYTES, **{"max_length": 300, "score": self.score, "generate": self.generate, "ends": {BYTES.eos_id},
                                             "temperature": 0.0, "settings": settings or {"seed": 0, "decoder": {"name": "low_confidence"}}} | fields)

    def score(self, requests, names):
        for i in reversed(range(len(requests))):
            self._note(names[i])
            prompt, answer = (BYTES.decode(ids) for ids in requests[i])
            right = any(f"of {country} is" in prompt and CAPITALS[country] in answer for country in self.knows)
            yield i, answers.Answer(-1.0 if right else -2.0 * len(answer), 0.5, right)

    def generate(self, prompts, names, length):
        self.shapes.append((len(prompts), length))
        for name in names:
            self._note(name)
        known = [[CAPITALS[c] for c in self.knows if f"of {c} is" in BYTES.decode(prompt)] for prompt, _ in prompts]
        texts = [f" {found[0]}.\nThe capital" if found else " nowhere" for found in known]
        return [(BYTES.encode(text) + [BYTES.eos_id, 65])[:new] for text, (_, new) in zip(texts, prompts, strict=True)]

    def _note(self, name):
        if self.die_after is not None and len(self.asked) == self.die_after:
            raise KeyboardInterrupt
        self.asked.append(name)

    def adapter(self, batch_size=4, max_new_tokens=None, truncate=False, items=None):
        return harness.Adapter(self.model, items or harness.Items(None, {}), batch_size, max_new_tokens, truncate)


def instances(*args):
    return [types.SimpleNamespace(args=a, task_name="task", doc_id=i, idx=0) for i, a in enumerate(args)]


def test_likelihoods_come_back_in_order_and_a_request_is_asked_once():
    stand_in = StandIn(knows=("Peru",))
    requests = instances(("The capital of Peru is", " Lima"), ("The capital of Peru is", " Rome"), ("The capital of Peru is", " Lima"))
    assert stand_in.adapter().loglikelihood(requests) == [(-1.0, True), (-10.0, False), (-1.0, True)]
    assert len(stand_in.asked) == len(set(stand_in.asked)) == 2
    other = StandIn(knows=("Peru",))
    other.adapter().loglikelihood(requests[1:])  # in other company a request has the same name in the noise
    assert set(other.asked) == set(stand_in.asked) and all(0 <= name < 2**31 for name in other.asked)


@pytest.mark.parametrize("context, continuation, prompt, answer", [
    ("ab", " c", "ab", " c"),
    ("ab  ", "c", "ab", "  c"),  # blanks at the end belong to the answer
    ("", "c", "", "c"),
    ("  ", "c", "", "  c"),
])  # fmt: skip
def test_where_prompts_end_and_answers_begin(context, continuation, prompt, answer):
    [request] = instances((context, continuation))
    assert StandIn().adapter()._pair("key", request) == (BYTES.encode(prompt), BYTES.encode(answer))


def test_a_token_across_the_boundary_is_not_cut():
    """"a" + "b" is one token of this stand-in; the library would take the ids after the first of the whole, which are none."""
    class Merging(tokenizer.Bytes):
        def encode(self, text):
            return [255 if t == "ab" else ord(t) for t in (["ab", *text[2:]] if text.startswith("ab") else text)]
    stand_in = StandIn()
    stand_in.model = stand_in.model._replace(tokenizer=Merging())
    adapter = stand_in.adapter()
    for continuation in ("b", "bc"):
        assert adapter._pair(continuation, *instances(("a", continuation))) == ([97], [ord(letter) for letter in continuation])
    assert adapter.apart == {"b", "bc"}


def test_prompts_that_do_not_fit():
    requests = instances(("x" * 15 + "y" * 15, "answer"))
    with pytest.raises(ConfigError, match=r"task, document 0: 30 prompt and 6 answer tokens .*max_length=20; use fewer few-shot .*truncate=True"):
        StandIn(max_length=20).adapter().loglikelihood(requests)
    adapter = StandIn(max_length=20).adapter(truncate=True)
    assert adapter._pair("key", requests[0]) == (BYTES.encode("y" * 14), BYTES.encode("answer")) and adapter.cut == {"key"}
    with pytest.raises(ConfigError, match="the answer alone is too long"):
        adapter.loglikelihood(instances(("", "x" * 21)))
    with pytest.raises(ConfigError, match=r"document 0: 5 prompt and 16 answer tokens"):
        StandIn(max_length=20).adapter().generate_until(instances(("abcde", {"max_gen_toks": 16})))
    with pytest.raises(ConfigError, match="write less with max_new_tokens"):
        StandIn(max_length=20).adapter().generate_until(instances(("a", {"max_gen_toks": 21})))


def test_empty_answers_are_refused_before_anything_runs():
    for kind, args in (("loglikelihood", ("a", "")), ("loglikelihood_rolling", ("",))):
        stand_in = StandIn()
        with pytest.raises(ConfigError, match=r"task, document 1.*no likelihood"):
            getattr(stand_in.adapter(), kind)(instances(("a", "b")[: len(args)], args))
        assert not stand_in.asked


def test_rolling_likelihoods_add_up():
    stand_in = StandIn(max_length=4)
    assert stand_in.adapter().loglikelihood_rolling(instances(("abcdefghij",), ("xyz",))) == [-20.0, -6.0]
    assert len(set(stand_in.asked)) == 4  # two stretches of four and one of two, and a whole text


@pytest.mark.parametrize("stops, text", [([], " Paris.\nThe capital"), (["\n"], " Paris."), ("capital", " Paris.\nThe "),
                                         (["z", "", "The", "."], " Paris")])
def test_stop_strings_cut_the_text(stops, text):
    assert StandIn().adapter().generate_until(instances(("The capital of France is", {"until": stops}))) == [text]


def test_texts_end_with_the_end_of_text_and_their_length():
    request = ("The capital of France is", {"until": []})
    assert StandIn(ends={ord("P")}).adapter().generate_until(instances(request)) == [" "]
    assert StandIn().adapter(max_new_tokens=4).generate_until(instances(request)) == [" Par"]  # in place of the task's
    assert StandIn().adapter().generate_until(instances((request[0], {"max_gen_toks": 3}))) == [" Pa"]


def test_few_shapes():
    """150 prompts of 1 to 150 letters: batches of 8 rows, in canvases of few lengths, and equally many tokens to write in each."""
    stand_in = StandIn(max_length=256)
    got = stand_in.adapter(batch_size=8).generate_until(instances(*(("x" * n, {"max_gen_toks": 40}) for n in range(1, 151))))
    assert got == [" nowhere"] * 150 and sum(rows for rows, _ in stand_in.shapes) == 150
    assert {rows for rows, _ in stand_in.shapes[:-1]} == {8} and {length for _, length in stand_in.shapes} == {48, 64, 96, 128, 192}
    assert {answers.bucket(n, 1000) for n in range(1, 1001)} == {32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1000}
    assert all(n <= answers.bucket(n, 1000) <= max(1.5 * n, 32) for n in range(1, 1001))


def test_a_request_again_is_another_sample():
    stand_in = StandIn()
    stand_in.adapter().generate_until(instances(*[("The capital of France is", {})] * 3))
    assert len(set(stand_in.asked)) == 3


@pytest.mark.parametrize("asked, temperature", [({"do_sample": True}, 1), ({"temperature": 0.7}, 0.7),
                                                ({"do_sample": True, "temperature": 0.2}, 0.2)])
def test_another_temperature_than_the_decoders_is_refused(asked, temperature):
    with pytest.raises(ConfigError, match=rf"asks for temperature {temperature}, but decoder.temperature=0; set that, or gen_kwargs do_sample=False"):
        StandIn().adapter().generate_until(instances(("x", asked)))
    for same in (asked, {}):
        StandIn(temperature=temperature).adapter().generate_until(instances(("x", same)))
    StandIn().adapter().generate_until(instances(("x", {"do_sample": False, "temperature": 0.7})))  # greedy, whatever it says


def test_chat_prompts_are_the_templates_ids_and_nothing_spells_them():
    stand_in = StandIn(render=lambda messages: [7, *BYTES.encode(messages[-1]["content"]), 8])
    adapter = stand_in.adapter()
    text = adapter.apply_chat_template([{"role": "user", "content": "Why?"}])
    assert adapter._pair("key", *instances((text, "so"))) == ([7, *BYTES.encode("Why?"), 8], BYTES.encode("so"))
    with pytest.raises(ConfigError, match="gen_prefix"):
        adapter.apply_chat_template([{"role": "user", "content": "Why?"}], add_generation_prompt=False)


# ---- the file of answers ----------------------------------------------------------------------------------------------------


def items_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_stopped_run_goes_on(tmp_path):
    path, settings = tmp_path / "out" / "items.jsonl", {"seed": 0, "decoder": {"name": "low_confidence"}}
    requests = instances(*((f"The capital of {country} is", f" {city}") for country, city in CAPITALS.items()))
    dies = StandIn(die_after=2)
    with pytest.raises(KeyboardInterrupt):
        dies.adapter(items=harness.Items(str(path), settings)).loglikelihood(requests)
    assert len(items_of(path)) == 3
    with path.open("a") as file:
        file.write('{"key": "half of a li')  # what a killed process leaves
    second = StandIn()
    items = harness.Items(str(path), settings)
    assert second.adapter(items=items).loglikelihood(requests) == [(-1.0, True)] * 5
    items.close()
    assert len(second.asked) == 3 and not set(second.asked) & set(dies.asked)
    head, *lines = items_of(path)
    assert head == {"settings": settings} and len({line["key"] for line in lines}) == 5
    assert {key: lines[0][key] for key in ("task", "document", "choice", "kind", "prompt_tokens", "tokens", "logprob", "error", "greedy")} == {
        "task": "task", "document": 4, "choice": 0, "kind": "loglikelihood", "prompt_tokens": 22, "tokens": 5, "logprob": -1.0, "error": 0.5,
        "greedy": True}
    third = StandIn()
    assert third.adapter(items=harness.Items(str(path), settings)).loglikelihood(requests[:1]) == [(-1.0, True)] and not third.asked


@pytest.mark.parametrize("now, words", [
    ({"seed": 1, "decoder": {"name": "a", "steps": 4}}, ["seed=0, now it is 1"]),
    ({"seed": 0, "decoder": {"name": "b", "steps": 4}}, ["decoder.name='a', now it is 'b'"]),
    ({"seed": 0, "decoder": {"name": "a"}}, ["decoder.steps=4, now it is None"]),
    ({"seed": 2, "decoder": {"name": "a", "steps": 5}}, ["decoder.steps=4, now it is 5", "(and seed)"]),
])  # fmt: skip
def test_a_file_made_with_other_settings_is_refused(tmp_path, now, words):
    path = tmp_path / "items.jsonl"
    harness.Items(str(path), {"seed": 0, "decoder": {"name": "a", "steps": 4}}).close()
    before = path.read_bytes()
    with pytest.raises(ConfigError) as error:
        harness.Items(str(path), now)
    assert all(word in str(error.value) for word in [*words, str(path)]), error.value
    assert path.read_bytes() == before


def test_a_file_that_is_none_is_refused(tmp_path):
    path = tmp_path / "items.jsonl"
    for text, number in (('{"settings": {}}\nnonsense\n', 2), ('{"id": 3}\n', 1), ('{"settings": {}}\n{"text": ""}\n{"key": "a"}\n', 2)):
        path.write_text(text)
        with pytest.raises(ConfigError, match=f"line {number}: no answer of an evaluation"):
            harness.Items(str(path), {})
        assert path.read_text() == text


# ---- with a model -----------------------------------------------------------------------------------------------------------


CONFIG = config_lib.Config(
    config_lib.Model(vocab_size=BYTES.vocab_size, hidden_size=16, num_layers=1, num_heads=2, num_experts=2, experts_per_token=1, expert_size=8,
                     max_length=64, init_std=0.2), train=config_lib.Train(batch_size=4), data=config_lib.Data(sequence_length=32, tokenizer="bytes"))


@functools.cache
def two_devices():
    """(model, variables, mesh)."""
    mesh = partitioning.make_mesh(devices=jax.devices()[:2])
    model = transformer.build(CONFIG.model, mesh=mesh)
    return model, jax.jit(model.init, out_shardings=partitioning.shardings_of(mesh, model.axes, model.shapes))(jax.random.key(0)), mesh


@functools.cache
def scorer(batch_size, draws=8):
    return answers.make(*two_devices(), BYTES.mask_id, BYTES.pad_id, likelihood.Estimator(draws=draws, group=4), batch_size=batch_size)


def test_scores_do_not_depend_on_batches():
    """Requests of many lengths, in batches of two sizes and another order, on two devices."""
    requests = [(BYTES.encode("The capital of Peru is"[: 3 * n]), BYTES.encode(" Lima, surely"[: 1 + 2 * (n % 4)])) for n in range(9)]
    names = list(range(100, 109))
    first = dict(scorer(4)(requests, names))
    again = dict(scorer(2)(requests[::-1], names[::-1]))
    assert sorted(first) == list(range(9))
    for i, answer in first.items():
        np.testing.assert_allclose(again[8 - i][:2], answer[:2], rtol=1e-4, atol=1e-5)
        assert answer.error == 0 if len(requests[i][1]) == 1 else answer.error > 0
        assert answer.logprob < 0 and answer.greedy == again[8 - i].greedy
    for request in (([], []), ([1], []), ([1] * 60, [1] * 5), ([BYTES.mask_id], [1])):
        with pytest.raises(ConfigError, match="request 1"):
            next(scorer(2)([requests[0], request], [1, 2]))


def test_what_is_written_depends_on_prompt_and_name_alone():
    """Drawn with noise, in other company and another order; a call pads its rows to the devices."""
    write = decode.writer(*two_devices(), BYTES, LowConfidence(16, 8, temperature=1.0), max_length=64, batch_size=3, seed=1)
    prompts = [(BYTES.encode(text), 12) for text in ("The capital of Peru is", "", "x = 1")]
    first = write(prompts, [5, 6, 7], 48)
    assert [len(ids) for ids in first] == [12] * 3 and all(BYTES.mask_id not in ids for ids in first)
    assert write(prompts[:0:-1], [7, 6], 48) == first[:0:-1] and write(prompts[:1], [5], 48) == first[:1]
    assert write(prompts[:1], [6], 48) != first[:1]
    spared = decode.writer(*two_devices(), BYTES, LowConfidence(16, 8, temperature=1.0), max_length=64, batch_size=3, seed=1,
                           suppressed=tuple(first[0]))
    assert not set(first[0]) & {token for ids in spared(prompts, [5, 6, 7], 48) for token in ids}
    broken = two_devices()[0]._replace(head=lambda variables, hidden: jax.numpy.full((*hidden.shape[:-1], BYTES.vocab_size), jax.numpy.nan))
    with pytest.raises(ConfigError, match="not finite"):
        decode.writer(broken, *two_devices()[1:], BYTES, LowConfidence(16, 8), max_length=64, batch_size=3)(prompts, [5, 6, 7], 48)


def test_output_that_is_not_finite_stops_the_run(monkeypatch):
    monkeypatch.setattr(likelihood, "conditional", lambda *_: likelihood.Conditional(np.full(8, np.nan), np.zeros(8), 1))
    monkeypatch.setattr(likelihood, "is_greedy", lambda *_: np.zeros(8, bool))
    model = types.SimpleNamespace(apply=None, cross_entropy=None, head=None, shapes={}, config=types.SimpleNamespace(max_length=9))
    score = answers.make(model, {}, partitioning.make_mesh(), BYTES.mask_id, BYTES.pad_id, likelihood.Estimator(), batch_size=8)
    with pytest.raises(ConfigError, match="not finite"):
        next(score([([1], [2])], [0]))
