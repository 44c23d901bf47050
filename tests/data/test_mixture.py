"""A mixture gives each data set its share of the tokens, in an order that ranks, workers and stops do not change."""

import json
import logging
import shutil
from collections import Counter
from dataclasses import replace

import pytest
from corpora import ByteTokenizer, json_lines
from test_loader import make_loaders, merged_state, take

from peft_pretraining.data import DataError, TokenizerError
from peft_pretraining.data import lanes as lanes_module
from peft_pretraining.data.loader import EvalSet, merge_states
from peft_pretraining.data.mixture import Mixture, data_orders, mixed, open_dataset, orders_text, source_figures, source_lines
from peft_pretraining.data.prepare import prepare
from peft_pretraining.data.source import default_lanes, open_source


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(lanes_module, "WINDOW_RECORDS", 4)


@pytest.fixture
def folders(tmp_path):
    """Three corpora whose documents begin with their letter, of different lengths; `b` has bad records."""
    for letter, count, length in (("a", 90, 9), ("b", 60, 40), ("c", 45, 3)):
        (tmp_path / letter).mkdir()
        lines = [json_lines([f"{letter}{number} " + letter * (number * 7 % length)]) for number in range(count)]
        if letter == "b":
            lines[5:5] = [b"broken\n"] * 3
        (tmp_path / letter / "train.jsonl").write_bytes(b"".join(lines))
        held_out = [f"{letter}H{number} " + letter * length for number in range(50)]
        (tmp_path / letter / "validation.jsonl").write_bytes(json_lines(held_out))
    return tmp_path


def mixture_of(folders, weights=(0.7, 0.2, 0.1), split="train", **options):
    text = ", ".join(f"{folders / letter}:{weight}" for letter, weight in zip("abc", weights, strict=True))
    mixture = open_dataset(text, split, **options)
    assert isinstance(mixture, Mixture)
    return mixture


ORDERS = [pytest.param(True, "lanes", id="packed-lanes"), pytest.param(False, "lanes", id="padded-lanes")]
ORDERS += [pytest.param(True, "global", id="packed-global"), pytest.param(False, "global", id="padded-global")]


# --- Which source gives the next sequence ---


class Piece:
    def __init__(self, length):
        self.ids = range(length)


def test_shares_of_the_tokens_converge_to_the_weights_whatever_the_lengths():
    """Long documents of a source come less often: the weights are of tokens."""
    lengths = (1, 50, 7)

    def pieces(source):
        while True:
            yield Piece(lengths[source])

    weights = (0.5, 0.3, 0.2)
    turns = mixed([pieces(source) for source in range(3)], weights, (0, 25, 3), (0, 0, 0))
    drawn = [0, 0, 0]
    for _ in range(3000):
        source, piece = next(turns)
        drawn[source] += len(piece.ids)
        ends = [tokens / weight for tokens, weight in zip(drawn, weights, strict=True)]
        # No source is ahead of another by more than its last sequence and an offset.
        assert max(ends) - min(ends) <= max((length + 25) / weight for length, weight in zip(lengths, weights, strict=True))
    assert [tokens / sum(drawn) for tokens in drawn] == pytest.approx(weights, abs=0.01)


@pytest.mark.parametrize(("packing", "order"), ORDERS)
def test_the_measured_share_is_the_weight(folders, byte_tokenizer, inline_workers, packing, order):
    (loader,) = make_loaders(mixture_of(folders), byte_tokenizer, 1, 0, packing=packing, data_order=order)
    batches = iter(loader)
    letters: Counter[str] = Counter()
    for _ in range(4000):
        batch = next(batches)
        letters[Counter(byte_tokenizer.decode(batch.input_ids[0].tolist())).most_common(1)[0][0]] += batch.num_tokens
    figures = source_figures(merged_state([loader]))
    total = sum(letters.values())
    for figure, weight in zip(figures, (0.7, 0.2, 0.1), strict=True):
        assert figure["weight"] == pytest.approx(weight)
        # Twelve lanes are each within two sequences of 20 tokens of their share.
        assert figure["tokens"] == pytest.approx(weight * total, abs=12 * 2 * 20)
    assert sum(figure["tokens"] for figure in figures) == total


def test_lanes_do_not_all_turn_to_a_source_at_once(folders, byte_tokenizer, inline_workers):
    """Of 100 lanes, some turn to each source at every turn, more to the sources of more weight; together they keep the shares."""
    (loader,) = make_loaders(mixture_of(folders), byte_tokenizer, 1, 0, lanes=100, data_order="global")
    batches = iter(loader)
    before, total = [0, 0, 0], [0, 0, 0]
    for _ in range(10):
        for _ in range(100):
            next(batches)
        total = [figure["tokens"] for figure in source_figures(merged_state([loader]))]
        turn = [(now - was) // 20 for now, was in zip(total, before, strict=True)]
        assert sum(turn) == 100
        assert 50 < turn[0] < 90, turn
        assert 3 < turn[2] < 20, turn
        before = total
    assert [tokens / sum(total) for tokens in total] == pytest.approx([0.7, 0.2, 0.1], abs=0.03)


# --- The same for any number of ranks and workers, and after stops ---


@pytest.mark.parametrize(("packing", "order"), [*ORDERS, pytest.param(True, None, id="default")])
def test_ranks_workers_and_stops_change_nothing(folders, byte_tokenizer, inline_workers, packing, order):
    mixture = mixture_of(folders)
    options = {"packing": packing, "data_order": order}
    expected = take(make_loaders(mixture, byte_tokenizer, 1, 0, **options), 360)
    taken, state = [], None
    for ranks, workers, batches in ((1, 2, 60), (3, 0, 24), (2, 3, 54), (4, 1, 18), (1, 0, 48)):
        loaders = make_loaders(mixture, byte_tokenizer, ranks, workers, **options)
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(state)
        taken += take(loaders, batches)
        state = merged_state(loaders)
    assert taken == expected
    whole = make_loaders(mixture, byte_tokenizer, 1, 0, **options)
    take(whole, 360)
    assert merged_state(whole) == state
    assert state["sources"][1]["bad_records"] == state["bad_records"]


def test_real_workers_give_the_same_with_a_source_in_each_order(folders, byte_tokenizer, monkeypatch):
    monkeypatch.setattr("peft_pretraining.data.source.GLOBAL_ORDER_BYTES", (folders / "b" / "train.jsonl").stat().st_size - 1)
    mixture = mixture_of(folders)
    assert set(data_orders(mixture, True, None)) == {"lanes", "global"}
    expected = take(make_loaders(mixture, byte_tokenizer, 1, 0), 60)
    loaders = make_loaders(mixture, byte_tokenizer, 1, 2)
    assert loaders[0].data_order == "mixed"
    try:
        assert take(loaders, 60) == expected
    finally:
        loaders[0].close()


def test_batches_taken_back_are_returned_again(folders, byte_tokenizer, inline_workers):
    (loader,) = make_loaders(mixture_of(folders), byte_tokenizer, 1, 0)
    take([loader], 17)
    before = loader.state_dict()
    again = take([loader], 9)
    loader.take_back(json.loads(json.dumps(before)))
    assert loader.state_dict() == before
    assert take([loader], 9) == again


def test_the_order_of_the_list_does_not_matter(folders, byte_tokenizer, inline_workers):
    first = mixture_of(folders)
    text = ", ".join(reversed(first.dataset.split(", ")))
    second = open_dataset(text, "train")
    assert first.fingerprint == second.fingerprint
    (one,), (other,) = (make_loaders(mixture, byte_tokenizer, 1, 0) for mixture in (first, second))
    assert take([one], 50) == take([other], 50)
    state = merged_state([one])
    other.load_state_dict(state)
    assert take([other], 50) == take([one], 50)


def test_weights_are_normalised_and_part_of_the_fingerprint(folders):
    assert mixture_of(folders, (7, 2, 1)).weights == (0.7, 0.2, 0.1)
    assert mixture_of(folders, (7, 2, 1)).fingerprint == mixture_of(folders).fingerprint
    assert mixture_of(folders, (7, 2, 1)).fingerprint != mixture_of(folders, (7, 1, 2)).fingerprint
    assert replace(mixture_of(folders), text_field="body").fingerprint != mixture_of(folders).fingerprint


# --- Changed mixtures ---


def test_changed_weights_hold_from_the_change_on(folders, byte_tokenizer, inline_workers):
    """The tokens before the change are not made up for, and no source loses its place."""
    (before,) = make_loaders(mixture_of(folders, (0.1, 0.1, 0.8)), byte_tokenizer, 1, 0)
    take([before], 1200)
    state = merged_state([before])
    (after,) = make_loaders(mixture_of(folders, (0.8, 0.1, 0.1)), byte_tokenizer, 1, 0)
    after.load_state_dict(state)
    assert [states[:5] for states in after.state_dict()["lanes"]["3"]] != [[0] * 5] * 3
    assert [list(map(int, s[:5])) for s in after.state_dict()["lanes"]["3"]] == [s[:5] for s in state["lanes"]["3"]]
    tokens = [figure["tokens"] for figure in source_figures(state)]
    take([after], 600)
    gained = [figure["tokens"] - was for figure, was in zip(source_figures(merged_state([after])), tokens, strict=True)]
    assert [gain / sum(gained) for gain in gained] == pytest.approx([0.8, 0.1, 0.1], abs=0.02)


def test_a_new_source_begins_at_its_start_and_the_others_go_on(folders, byte_tokenizer, inline_workers):
    a, b = (open_source(str(folders / letter), "train") for letter in "ab")
    (single,) = make_loaders(a, byte_tokenizer, 1, 0)
    take([single], 30)
    state = merged_state([single])
    (loader,) = make_loaders(open_dataset(f"{a.dataset}:1, {b.dataset}:1", "train"), byte_tokenizer, 1, 0)
    loader.load_state_dict(state, (a.dataset, a.fingerprint))
    lanes = loader.state_dict()["lanes"]
    assert {lane: numbers[0][:5] for lane, numbers in lanes.items()} == state["lanes"]
    assert all(numbers[1] == [0] * 6 for numbers in lanes.values())
    (alone,) = make_loaders(a, byte_tokenizer, 1, 0)
    alone.load_state_dict(merged_state([loader]))
    assert merged_state([alone])["lanes"] == state["lanes"]
    assert take([alone], 30) == take([single], 30)


# --- What is in a mixture ---


def test_the_plan_names_each_source_its_share_and_its_order(folders):
    mixture = mixture_of(folders)
    lines = mixture.describe().splitlines()
    assert lines[0].startswith(f"70.0% {folders / 'a'} (train): 1 of 2 files")
    assert lines[-1] == "shares of the tokens as weighted"
    names = ", ".join(source.dataset for source in mixture.sources)
    assert orders_text(mixture, data_orders(mixture, False, None)).startswith(f"{names}: global order")
    by_one = orders_text(mixture, ("lanes", "global", "lanes"))
    assert by_one.startswith(f"{mixture.sources[1].dataset}: global order")


def test_without_weights_the_bytes_of_the_training_files_decide(folders):
    text = ", ".join(str(folders / letter) for letter in "abc")
    train, held_out = open_dataset(text, "train"), open_dataset(text, "validation")
    sizes = [(folders / letter / "train.jsonl").stat().st_size for letter in "abc"]
    assert train.weights == held_out.weights
    assert train.weights == pytest.approx([size / sum(sizes) for size in sizes])
    assert train.describe().endswith("shares of the tokens by the bytes of their files")


def test_an_unknown_size_is_refused_with_the_way_out(folders):
    with pytest.raises(DataError, match=r"size of c4 is unknown; give each a weight \(NAME:0.5\)"):
        open_dataset(f"c4, {folders / 'a'}", "train")
    # A dry run does not know the sizes of data on the hub yet.
    dry = open_dataset(f"hub:a/b, {folders / 'a'}", "train", resolve=False)
    assert dry.weights is None
    assert dry.describe().endswith("known when the run starts")


def test_a_file_in_two_sources_is_refused(folders):
    file = folders / "a" / "train.jsonl"
    with pytest.raises(DataError, match="both read"):
        open_dataset(f"{folders / 'a'}:0.5, {file}:0.5", "train")


def test_an_invalid_list_is_an_error_of_the_data(folders):
    with pytest.raises(DataError, match="no weight for"):
        open_dataset(f"{folders / 'a'}:0.5, {folders / 'b'}", "train")


def test_c4_in_a_list_decides_the_number_of_lanes():
    assert default_lanes("c4:0.5, demo:0.5") == 64
    assert default_lanes("hub:a/b:0.5, demo:0.5") == 24


# --- Prepared sources ---


@pytest.fixture
def prepared(folders, byte_tokenizer):
    for letter in "ab":
        prepare(str(folders / letter), byte_tokenizer, folders / f"{letter}-tokens", progress=False)
    return folders


@pytest.mark.parametrize("names", [("a-tokens", "b-tokens"), ("a-tokens", "b")])
def test_prepared_sources_give_the_sequences_of_their_text(prepared, byte_tokenizer, inline_workers, names, monkeypatch):
    """Mixed with raw text or not. The draw of lanes' offsets depends on the fingerprint, so it is fixed here."""
    monkeypatch.setattr("peft_pretraining.data.loader.lane_offsets", lambda order, names, lane: [0.5 * lane, lane])
    raw, tokens = (open_dataset(f"{prepared / one}:2, {prepared / other}:1", "train") for one, other in (("a", "b"), names))
    assert tokens.default_tokenizer == str(prepared / "a-tokens" / "tokenizer")
    (expected,), (loader,) = (make_loaders(mixture, byte_tokenizer, 1, 0) for mixture in (raw, tokens))
    assert take([loader], 100) == take([expected], 100)


def test_prepared_sources_without_weights_go_by_their_tokens(prepared):
    mixture = open_dataset(f"{prepared / 'a-tokens'}, {prepared / 'b-tokens'}", "train")
    lengths = []
    for letter in "ab":
        lines = (prepared / letter / "train.jsonl").read_text().splitlines()
        lengths.append(sum(len(json.loads(line)["text"]) for line in lines if line != "broken"))
    assert mixture.weights == pytest.approx([length / sum(lengths) for length in lengths])
    assert mixture.describe().endswith("by their tokens")
    assert mixture.prepared is not None


def test_prepared_with_another_tokenizer_is_refused(prepared, byte_tokenizer):
    class Other(ByteTokenizer):
        name, fingerprint = "other", "another"

    mixture = open_dataset(f"{prepared / 'a'}:1, {prepared / 'b-tokens'}:1", "train")
    with pytest.raises(TokenizerError, match="b-tokens was prepared with: bytes"):
        make_loaders(mixture, Other(), 1, 0)


def test_different_tokenizers_of_the_sources_must_be_settled(folders, tmp_path):
    mixture = open_dataset(f"demo:1, {folders / 'a'}:1", "train", resolve=False, cache_dir=tmp_path / "cache")
    with pytest.raises(DataError, match="name one: --tokenizer NAME"):
        _ = mixture.default_tokenizer


# --- Evaluation ---


def eval_set(source, tokenizer, **options):
    return EvalSet(source, tokenizer, **{"max_length": 32, "packing": False, "max_tokens": None, **options})


def letters_of(evaluation: EvalSet, tokenizer) -> Counter[str]:
    letters: Counter[str] = Counter()
    for batch in evaluation:
        letters[tokenizer.decode(batch.input_ids[0].tolist())[0]] += batch.num_targets
    return letters


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("most", [400, None])
def test_evaluation_has_the_same_shares(folders, byte_tokenizer, most, packing, caplog):
    with caplog.at_level(logging.WARNING):
        found = eval_set(mixture_of(folders, split="validation"), byte_tokenizer, max_tokens=most, packing=packing)
        total = found.num_targets
        letters = letters_of(found, byte_tokenizer)
    if not packing:
        for letter, weight in zip("abc", (0.7, 0.2, 0.1), strict=True):
            assert letters[letter] == pytest.approx(weight * total, abs=32)
    if most is None:
        assert f"held-out part of {folders / 'a'}" in caplog.text  # the shortest for its weight
        assert letters["a"] == sum(len(f"aH{number} " + "a" * 9) for number in range(50)) or packing
    else:
        assert most <= total < most + 3 * 32
        assert not caplog.text


def test_a_separate_evaluation_set_may_be_a_mixture(folders, byte_tokenizer):
    held_out = mixture_of(folders, (1, 1, 2), split="validation", trained_on=[])
    assert set(letters_of(eval_set(held_out, byte_tokenizer, max_tokens=300), byte_tokenizer)) == set("abc")


def test_of_an_evaluation_set_that_is_trained_on_only_the_held_out_part_is_read(tmp_path, write_shards, monkeypatch):
    """However its place is written, and within a mixture; of the other evaluation sets everything is read."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "texts.jsonl").write_text("".join(json.dumps({"text": f"{name} {n}"}) + "\n" for n in range(300)))
    monkeypatch.chdir(tmp_path)
    (alone,) = open_dataset("a/", "validation", trained_on=[f"c4:1, {tmp_path / 'a'}:3"]).sources
    assert alone.keep == "validation"
    both = open_dataset("a:1, b:1", "validation", trained_on=["c4", str(tmp_path / "a")])
    assert [source.keep for source in both.sources] == ["validation", "all"]
    # Files named test are never trained on.
    shutil.copyfile(tmp_path / "b" / "texts.jsonl", tmp_path / "a" / "test.jsonl")
    (tested,) = open_dataset("a", "validation", trained_on=["a"]).sources
    assert ([shard.name for shard in tested.shards], tested.keep) == (["test.jsonl"], "all")


def test_a_mixture_without_weights_is_evaluated_with_the_shares_that_it_is_trained_with(tmp_path):
    """Not with those of its validation files, also if it is opened as evaluation data."""
    for name, records in (("a", 300), ("b", 100)):
        (tmp_path / name).mkdir()
        for split, number in (("train", records), ("validation", 10)):
            text = "".join(json.dumps({"text": f"{name} {n:03}"}) + "\n" for n in range(number))
            (tmp_path / name / f"{split}.jsonl").write_text(text)
    text = f"{tmp_path / 'a'}, {tmp_path / 'b'}"
    assert open_dataset(text, "validation", trained_on=[text]).weights == open_dataset(text, "train").weights == (0.75, 0.25)


# --- The record ---


def test_each_source_is_counted(folders, byte_tokenizer, inline_workers, caplog):
    loaders = make_loaders(mixture_of(folders), byte_tokenizer, 2, 0, data_order="lanes", packing=False)
    take(loaders, 300)
    state = merge_states([loader.state_dict() for loader in loaders])
    figures = source_figures(state)
    assert [figure["bad_records"] > 0 for figure in figures] == [False, True, False]
    assert figures[0]["passes"][1] >= 1
    lines = source_lines(state)
    assert lines[1].startswith(f"{folders / 'b'}: {figures[1]['tokens']:,} tokens, ")
    assert "asked 20.00%" in lines[1]
    row = loaders[0].row()
    assert sum(value for name, value in row.items() if name.startswith("data_share/")) == pytest.approx(1)
    assert row[f"data_passes/{folders / 'a'}"] > row[f"data_passes/{folders / 'b'}"]


def test_a_single_data_set_has_the_state_of_before(folders, byte_tokenizer, inline_workers):
    (loader,) = make_loaders(open_dataset(str(folders / "a"), "train"), byte_tokenizer, 1, 0)
    take([loader], 5)
    assert list(loader.state_dict()) == ["position", "lanes", "bad_records", "order", "corpus"]
    assert all(len(numbers) == 5 for numbers in loader.state_dict()["lanes"].values())
    assert loader.row() == {}
