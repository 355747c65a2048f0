"""Text probes: a string search answers all of them, a guess none; budgets, depths, chains, seeds."""

import hashlib
import itertools
import re

import numpy as np
import pytest
from scipy import stats

from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.text.probes.generate import byte_count, draw_probe, make_probe, probe_documents, probe_grid
from seqzoo.pipelines.text.probes.haystacks import NOISE, neutral_sentences, sentences
from seqzoo.pipelines.text.probes.scores import containment, exact_match
from seqzoo.pipelines.text.probes.text_tasks import FORMATS, TEXT_TASKS, Fresh
from seqzoo.pipelines.text.probes.words import ADJECTIVES, NOUNS

ONE = [name for name, task in TEXT_TASKS.items() if task.one_needle]
SEVERAL = [name for name in TEXT_TASKS if name not in ONE]
LONGEST = {"noise": len(NOISE[-1]) + 1, "essay": 160, "needles": 150}  # of a unit with its blank, in bytes


def parts(probe):
    """intro, haystack with needles, question of a prompt."""
    intro, body, question = probe.prompt.split("\n")
    return intro, body, question


def search(prompt):
    """What a reader with a text editor answers: the form is recognised and the needles are looked up."""
    *_, body, question = prompt.split("\n")
    if "pass key" in question:
        return re.findall(r"The pass key is (\d+)\. Remember it\.", body)
    if "Which variables" in question:
        value, chain = re.search(r"value (\d+)\?", question)[1], []
        sources = {source: name for name, source in re.findall(r"VAR ([A-Z]{5}) = (\d+|VAR [A-Z]{5})\.", body)}
        while value in sources:
            chain.append(sources[value])
            value = f"VAR {chain[-1]}"
        return chain
    asked = re.search(r"What are all the special magic \w+ for (.+)\?", question)[1]
    found = []
    for key in re.split(", | and ", asked):
        found += re.findall(rf"for {re.escape(key)} is: (\S+)\.", body)
    return found


@pytest.mark.parametrize("example", [False, True])
@pytest.mark.parametrize("task", TEXT_TASKS)
def test_a_string_search_answers_everything_and_a_guess_nothing(task, example):
    rng, guessed = np.random.default_rng(1), []
    for index in range(30):
        probe = make_probe(task, 2500, index=index, example=example)
        found = search(probe.prompt)
        assert tuple(found) == probe.answers
        assert containment(" and ".join(found), probe.answers) == 1 and exact_match(probe.continuation, found)
        guess = Fresh(rng)
        text = f"{guess.number(5)} {guess.number(7)} {guess.identifier()} {guess.name()} {guess.words()}"
        guessed.append(containment(text, probe.answers))
    assert np.mean(guessed) < 0.02


@pytest.mark.parametrize("task", TEXT_TASKS)
def test_the_prompt_fits_within_one_sentence(task):
    for length, index in itertools.product((900, 1500, 4096), range(8)):
        probe = make_probe(task, length, index=index)
        size = byte_count(probe.document)
        assert length - LONGEST[TEXT_TASKS[task].haystack] < size <= length, (size, length)
        meta = probe.meta
        assert meta["tokens"] == meta["characters"] == len(probe.prompt) and meta["length"] == length
        assert meta["task"] == task and meta["index"] == index


def crooked(text):
    """Tokens of a tokeniser that merges across sentences: neither additive nor one a byte."""
    return len(text.split()) + len(re.findall(r"[ae]\. T", text)) - len(re.findall(r"n\. [SH]", text)) + len(text) % 3


def with_start_and_end(text):
    """Four characters a token and two more for every text: sentences alone count for more than in the prompt."""
    return len(text) // 4 + 2


@pytest.mark.parametrize("count_tokens", [byte_count, crooked, with_start_and_end, lambda text: len(text) // 4])
@pytest.mark.parametrize("depth", [None, 0.0, 0.4, 1.0])
def test_one_more_sentence_would_not_fit(count_tokens, depth):
    essay = "A sentence of the one and only length. "
    for length in range(700, 740):
        kwargs = {"essay": essay, "count_tokens": count_tokens, "reserve": 11, "depth": depth}
        probe = make_probe("needle", length, **kwargs)
        intro, body, question = parts(probe)
        assert count_tokens(probe.prompt) <= length - 11
        longer = "\n".join([intro, body + " " + essay.strip(), question])
        assert count_tokens(longer) > length - 11 - (count_tokens is crooked)  # a sentence elsewhere may be one more
        assert body.count("only length.") == probe.meta["units"]


def gap_of_the_needle(probe):
    """How many sentences of the haystack stand before the needle that is asked, and how many there are."""
    _, body, _ = parts(probe)
    found = re.findall(r"The pass key is \d+\. Remember it\.|One of the special magic .*? is: \S+\.", body)
    for needle in found:
        if probe.answers[0] in needle:
            body = body.replace(needle, "NEEDLE.")
        elif TEXT_TASKS[probe.meta["task"]].haystack != "needles":
            body = body.replace(needle + " ", "").replace(" " + needle, "")
    units = body.split(". ")
    return [unit.strip(".") for unit in units].index("NEEDLE"), len(units) - 1


@pytest.mark.parametrize("task", ["passkey", "needle", "multikey"])
def test_random_depths_are_uniform(task):
    places, noise = [], np.random.default_rng(0)
    for index in range(1500):
        probe = make_probe(task, 900, index=index)
        gap, units = gap_of_the_needle(probe)
        assert units == probe.meta["units"] and probe.meta["depths"] == (gap / units,)
        assert probe.meta["depth"] == gap / units
        places.append((gap + noise.random()) / (units + 1))  # uniform over [0, 1) where gaps 0 ... units are
    assert stats.kstest(places, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("task", ONE)
@pytest.mark.parametrize("depth", [0.0, 0.3, 0.5, 1.0])
def test_a_chosen_depth_is_the_nearest_gap(task, depth):
    for index in range(5):
        probe = make_probe(task, 3000, depth=depth, index=index)
        gap, units = gap_of_the_needle(probe)
        assert units == probe.meta["units"] and gap == round(depth * units)
        assert probe.meta["depth"] == depth and probe.meta["depths"] == (gap / units,)


def test_prompts_of_two_depths_differ_in_nothing_else():
    shallow, deep = (make_probe("multikey", 2000, depth=depth) for depth in (0.0, 1.0))
    assert shallow.answers == deep.answers and shallow.prompt != deep.prompt
    assert sorted(parts(shallow)[1].strip(".").split(". ")) == sorted(parts(deep)[1].strip(".").split(". "))


@pytest.mark.parametrize("task", TEXT_TASKS)
def test_no_answer_is_anywhere_else(task):
    for index in range(20):
        probe = make_probe(task, 3000, index=index, example=index % 2 == 1)
        folded = probe.prompt.casefold()
        counts = [folded.count(answer.casefold()) for answer in probe.answers]
        assigned_on = task == "variables"
        assert counts == [2] * (len(counts) - 1) * assigned_on + [1] * (1 if assigned_on else len(counts))
        assert len(set(probe.answers)) == len(probe.answers)


def test_an_answer_that_the_essay_holds_is_drawn_again(monkeypatch):
    number = Fresh.number
    monkeypatch.setattr(Fresh, "number", lambda self, digits: number(self, 1))
    for index in range(10):
        assert make_probe("needle", 400, index=index, essay="1 2 3 4 and 6 7 8 9.").answers == ("5",)
    with pytest.raises(UserError, match="no answer to needle could be found"):
        make_probe("needle", 400, essay="123456789.")


def test_a_variable_is_no_word_of_the_haystack_in_any_case(monkeypatch):
    names = iter(["GRASS", "APPLE", *(["VWXYZ", "QWXYZ"] * 50)])
    monkeypatch.setattr(Fresh, "name", lambda self: next(names))
    probe = make_probe("variables", 600, num_hops=1)
    assert probe.answers == ("VWXYZ", "QWXYZ")  # GRASS is in the noise


@pytest.mark.parametrize("chains", [1, 3])
def test_variables_come_in_order_without_cycles(chains):
    for index in range(20):
        probe = make_probe("variables", 2500, index=index, num_chains=chains, num_hops=3)
        statements = re.findall(r"VAR ([A-Z]{5}) = (\d{5}|VAR [A-Z]{5})\.", parts(probe)[1])
        assert len(statements) == chains * 4
        names = [name for name, _ in statements]
        assert len(set(names)) == len(names)  # assigned once
        known, roots = {}, []
        for name, source in statements:  # in text order: a source is known before it is used, so there is no cycle
            if source.isdigit():
                roots.append(source)
                known[name] = source
            else:
                known[name] = known[source.removeprefix("VAR ")]
        assert len(set(roots)) == chains
        asked = re.search(r"value (\d+)\?", probe.prompt)[1]
        assert tuple(name for name in names if known[name] == asked) == probe.answers
        assert list(probe.meta["depths"]) == sorted(probe.meta["depths"]) and probe.meta["depth"] is None


def test_multikey_hides_the_key_among_others_in_no_fixed_order():
    ranks = []
    for index in range(300):
        probe = make_probe("multikey", 1500, index=index)
        values = re.findall(r"is: (\d{7})\.", parts(probe)[1])
        keys = re.findall(r"for (\S+) is:", parts(probe)[1])
        assert len(values) == len(set(values)) == len(set(keys)) == 4
        ranks.append(values.index(probe.answers[0]))
    assert stats.chisquare(np.bincount(ranks, minlength=4)).pvalue > 1e-3
    probe = make_probe("multikey_needles", 4000)
    assert parts(probe)[1].count("One of the special magic numbers") == probe.meta["units"] + 1
    assert len(re.findall("magic", make_probe("multikey", 3000, num_keys=9).prompt)) == 9 + 3


def test_multivalue_and_multiquery_ask_all_their_values():
    probe = make_probe("multivalue", 2000)
    places = [probe.prompt.index(answer) for answer in probe.answers]
    assert len(places) == 4 and places == sorted(places)
    probe = make_probe("multiquery", 2000, num_queries=2)
    assert len(probe.answers) == 2 and len(re.findall(r"is: \d", probe.prompt)) == 4
    keys = re.search(r"for (\S+) and (\S+)\?", probe.prompt).groups()
    assert [re.search(rf"for {key} is: (\d+)", probe.prompt)[1] for key in keys] == list(probe.answers)
    assert len(make_probe("needle", 2000, num_queries=6).answers) == 6  # as many keys as are asked for


@pytest.mark.parametrize("task", TEXT_TASKS)
def test_a_probe_is_a_function_of_its_number(task):
    def prompt(**kwargs):
        return make_probe(task, 1200, **kwargs)

    assert prompt(seed=1, index=4) == prompt(seed=1, index=4)
    others = [
        prompt(seed=1, index=5),
        prompt(seed=2, index=4),
        prompt(seed=1, index=4, split="train"),
        prompt(seed=1, index=4, split="validation"),
    ]
    probes = [prompt(seed=1, index=4), *others]
    assert len({probe.prompt for probe in probes}) == 5 and len({probe.answers for probe in probes}) == 5


def test_the_first_probes_stay_what_they_are():
    digest = hashlib.sha256()
    for task, index in itertools.product(TEXT_TASKS, range(10)):
        digest.update(make_probe(task, 1500, index=index).document.encode())
    assert digest.hexdigest()[:16] == "0a1cb70d848622b0"


def test_a_grid_has_its_cells_in_order_each_with_keys_of_its_own():
    probes = list(probe_grid("passkey", [400, 300], [0.0, 0.5, 1.0], samples=2, seed=3))
    cells = [(probe.meta["length"], probe.meta["depth"]) for probe in probes]
    assert cells == [(length, depth) for length in (400, 300) for depth in (0.0, 0.5, 1.0) for _ in range(2)]
    assert len({probe.answers for probe in probes}) == 12
    assert [probe.meta["index"] for probe in probes] == list(range(12))
    assert probes[7] == make_probe("passkey", 300, depth=0.0, seed=3, index=7)
    assert len(list(probe_grid("variables", [600], samples=3))) == 3


def test_an_essay_is_cut_into_its_sentences_and_read_on_from_a_random_one():
    text = "One is here.\n Two was\0there!  Three?  四。五。" + "word " * 100
    units = sentences(text)
    assert units[:5] == ("One is here.", "Two was there!", "Three?", "四。", "五。")
    assert " ".join(units[5:]) == ("word " * 100).strip() and max(map(len, units)) <= 300
    essay = " ".join(f"Sentence {chr(97 + number)}." for number in range(10))
    starts = set()
    for index in range(60):
        body = parts(make_probe("needle", 500, index=index, essay=essay))[1]
        letters = "".join(re.findall(r"Sentence (\w)\.", body))
        starts.add(letters[0])
        assert len(letters) > 10 and letters in "abcdefghij" * 10
    assert len(starts) == 10
    odd = b"caf\xe9 au lait. ".decode("utf-8", "surrogateescape")  # bytes that are no UTF-8 pass through
    (document,) = probe_documents(np.random.default_rng(0), 1, 400, ["needle"], essay=odd)
    assert b"caf\xe9 au lait." in document and len(document) <= 400


def test_generated_sentences_say_nothing_that_is_asked():
    made = list(itertools.islice(neutral_sentences(np.random.default_rng(0)), 3000))
    assert len(set(made)) > 2900
    assert all(re.fullmatch(r"[A-Z][a-z ]+\.", sentence) and len(sentence) < LONGEST["essay"] for sentence in made)
    words = set(" ".join(made).lower().replace(".", "").split())
    assert not words & {"magic", "special", "key", "pass", "var", "value", "number", "numbers"}
    assert set(ADJECTIVES) | set(NOUNS) <= words
    plain = sum(bool(re.match(r"The \w+ \w+", sentence)) for sentence in made)
    assert 1000 < plain < 2000


def test_keys_never_run_out():
    fresh = Fresh(np.random.default_rng(0))
    keys = [fresh.words() for _ in range(30_000)]  # there are 20,900 pairs
    assert len(set(keys)) == 30_000 and keys[0].count("-") == 1 and keys[-1].count("-") == 2


def test_documents_to_train_on_hold_the_format_and_the_answer():
    tasks = ["passkey", "needle", "variables"]
    made = probe_documents(np.random.default_rng(0), 200, 400, tasks, haystack="noise")
    assert made == probe_documents(np.random.default_rng(0), 200, 400, tasks, haystack="noise")
    assert len(set(made)) == 200 and all(350 < len(document) <= 400 for document in made)
    kinds = []
    for document in made:
        text = document.decode()
        (kind,) = (name for name, form in FORMATS.items() if text.startswith(form.intro[:8]))
        *_, question = text.split("\n")
        prefix = FORMATS[kind].answer_prefix.rpartition("}")[2] or FORMATS[kind].answer_prefix
        prompt, answer = text[: text.rindex(prefix) + len(prefix)], text[text.rindex(prefix) + len(prefix) :]
        assert answer == " " + ", ".join(search(prompt)) + "." and prefix in question
        kinds.append(kind)
    assert min(kinds.count(kind) for kind in tasks) > 40


def test_a_solved_example_comes_first_with_answers_of_its_own():
    probe = make_probe("variables", 1500, example=True)
    first, second = probe.prompt.split("\n\n")
    assert first.endswith(".") and search(first.rpartition(":")[0] + ":") == re.split(
        ", ", first[:-1].rpartition(": ")[2]
    )
    assert tuple(search(second)) == probe.answers
    assert byte_count(probe.document) <= 1500


@pytest.mark.parametrize(
    "task, kwargs, message",
    [
        ("paskey", {}, "no text probe 'paskey'.*Did you mean passkey"),
        ("passkey", {"num_keys": 3}, "passkey has no option 'num_keys'.*haystack"),
        ("needle", {"num_key": 3}, "no option 'num_key'.*num_keys"),
        ("needle", {"haystack": "esay"}, "haystack='esay'.*essay"),
        ("needle", {"num_keys": 0}, "num_keys=0 must be a positive integer"),
        ("passkey", {"haystack": "needles"}, "passkey has no haystack of needles"),
        ("passkey", {"depth": 1.5}, "depth=1.5 must lie between 0"),
        ("passkey", {"depth": float("nan")}, "depth=nan must lie between 0"),
        ("multivalue", {"depth": 0.5}, "multivalue asks for several needles.*passkey, needle_noise"),
        ("passkey", {"split": "tests"}, "split='tests'.*Did you mean test"),
        ("needle", {"essay": " \n"}, "the essay holds no text"),
    ],
)
def test_wrong_arguments_name_the_nearest_right_ones(task, kwargs, message):
    with pytest.raises(UserError, match=message):
        make_probe(task, 1000, **kwargs)


@pytest.mark.parametrize("task", TEXT_TASKS)
def test_the_shortest_length_is_said_and_works(task):
    with pytest.raises(UserError, match=rf"{task} needs (\d+) tokens before any haystack, got length=20") as error:
        make_probe(task, 20)
    shortest = int(re.search(r"needs (\d+)", str(error.value))[1])
    probe = make_probe(task, shortest)
    assert byte_count(probe.document) == shortest and probe.meta["units"] == 0
    with pytest.raises(UserError):
        make_probe(task, shortest - 1)


def test_no_task_to_train_on():
    with pytest.raises(UserError, match="tasks is empty"):
        probe_documents(np.random.default_rng(0), 1, 300, [])
    assert draw_probe(np.random.default_rng(0), "passkey", 300).meta.keys() >= {"task", "depth", "length"}
