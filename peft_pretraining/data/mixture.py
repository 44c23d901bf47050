"""A mixture: several data sets, read together so that their shares of the tokens are the weights.

Each sequence comes from one data set. From which one, a lane decides by `mixed`, a schedule that depends only on the seed, the
lane, the weights and the tokens of the lane's sequences before. Each data set keeps its own order and passes (lanes.py). Imports
neither torch nor numpy, so that a dry run describes a mixture at once.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from peft_pretraining.config.dataset_list import DatasetListError, shares_dataset, split_datasets
from peft_pretraining.config.files import PathError
from peft_pretraining.data import DataError
from peft_pretraining.data.prepared import read_manifest
from peft_pretraining.data.source import DataOrder, PreparedWith, Source, is_remote, open_source, order_text, prepared_folder

if TYPE_CHECKING:
    from collections.abc import Sized


@dataclass(frozen=True)
class Mixture:
    """One split of several data sets. weights: shares of the tokens, above 0, of sum 1; None where they are not known yet.

    weighed_by: where the weights come from, such as "by their tokens", for messages. text_field: name of the field with the text,
    for all sources that are not prepared. rules: version of the rules by which records are read (source.READING_RULES). Both are
    part of the fingerprint.
    """

    dataset: str
    sources: tuple[Source, ...]
    weights: tuple[float, ...] | None
    weighed_by: str
    text_field: str
    rules: int

    @property
    def fingerprint(self) -> str:
        """Equal for the same data sets with the same weights in any order."""
        parts = zip(self.fingerprints(), self.weights or (), strict=False)
        return hashlib.blake2b(json.dumps(sorted(parts)).encode(), digest_size=16).hexdigest()

    def fingerprints(self) -> list[str]:
        """The fingerprint of each source."""
        return [replace(source.with_text_field(self.text_field), rules=self.rules).fingerprint for source in self.sources]

    def with_text_field(self, name: str) -> Mixture:
        """The mixture with its sources read from this field."""
        return replace(self, text_field=name)

    @property
    def default_tokenizer(self) -> str:
        """The tokenizer of the prepared sources, else the one that all sources have. Raises DataError: they differ."""
        prepared = [source for source in self.sources if source.prepared is not None]
        names = {source.dataset: source.default_tokenizer for source in prepared or self.sources}
        if not prepared and len(set(names.values())) > 1:
            own = ", ".join(f"{dataset}: {name}" for dataset, name in names.items())
            raise DataError(
                f"--dataset {self.dataset}: its data sets have different tokenizers ({own}); name one: --tokenizer NAME"
            )
        return next(iter(names.values()))

    @property
    def prepared(self) -> PreparedWith | None:
        """The tokenizer of prepared data, if all sources are prepared."""
        first = self.sources[0].prepared
        return first if all(source.prepared is not None for source in self.sources) else None

    def describe(self) -> str:
        """One line for each source, and what the shares are."""
        shares = [f"{weight:.1%} " for weight in self.weights] if self.weights else [""] * len(self.sources)
        lines = [f"{share}{source.describe()}" for share, source in zip(shares, self.sources, strict=True)]
        return "\n".join([*lines, f"shares of the tokens {self.weighed_by}"])

    def document(self) -> list[dict[str, Any]]:
        """The sources for run.json."""
        return [
            {"dataset": source.dataset, "weight": weight, "fingerprint": fingerprint, "description": source.describe()}
            for source, weight, fingerprint in zip(self.sources, self.weights or (), self.fingerprints(), strict=True)
        ]


def open_dataset(
    dataset: str, split: Any, *, trained_on: Sequence[str] | None = None, resolve: bool = True, **options: Any
) -> Source | Mixture:
    """Opens a data set or a list of them as a mixture; the other arguments and the errors are those of `open_source`.

    trained_on: None: the data is trained on, and its validation split is what is held out of it. For evaluation data: the values
    of --dataset that were trained on. Of a data set named there, none of the training documents is read; of others, every
    document of the split.

    Raises DataError too where a list is invalid, two data sets read the same file, or weights are left to sizes that are unknown.
    """

    def held_out(name: str) -> bool:
        return trained_on is None or any(shares_dataset(name, trained) for trained in trained_on)

    def opened(name: str, split: Any) -> Source:
        source = open_source(name, split, hold_out=trained_on is None, resolve=resolve, **options)
        if trained_on is None or not held_out(name):
            return source
        # Files that are named validation or test are read; without such files, what the rule holds out.
        by_rule = open_source(name, split, hold_out=True, resolve=resolve, **options)
        return by_rule if by_rule.shards == source.shards else source

    try:
        wanted = split_datasets(dataset)
    except (DatasetListError, PathError) as error:
        raise DataError(f"dataset {dataset!r}: {error}") from None
    if len(wanted) == 1:
        return opened(wanted[0][0], split)
    sources = tuple(opened(name, split) for name, _ in wanted)
    _refuse_shared_files(dataset, sources)
    given = [weight for _, weight in wanted if weight is not None]
    weighed_by, sizes = "as weighted", given
    if not given:
        # A held-out split has the shares of its training split.
        weighed = sources
        if split != "train" and all(held_out(name) for name, _ in wanted):
            weighed = tuple(open_source(name, "train", resolve=resolve, **options) for name, _ in wanted)
        weighed_by, sizes = _sizes(dataset, weighed, resolve)
    # Rounded, so that 7 and 3 are the same weights as 0.7 and 0.3, in any order.
    weights = tuple(float(f"{size / math.fsum(sizes):.12g}") for size in sizes) or None
    return Mixture(dataset, sources, weights, weighed_by, options.get("text_field", "text"), sources[0].rules)


def _refuse_shared_files(dataset: str, sources: Sequence[Source]) -> None:
    owners: dict[str, str] = {}
    for source in sources:
        for shard in source.shards:
            place = shard.url if is_remote(shard.url) else os.path.realpath(shard.url)
            if owners.setdefault(place, source.dataset) != source.dataset:
                raise DataError(
                    f"--dataset {dataset}: {owners[place]} and {source.dataset} both read {shard.url}; name data sets without "
                    "common files"
                )


def _sizes(dataset: str, sources: Sequence[Source], resolve: bool) -> tuple[str, list[float]]:
    """(what they are, size of each source): tokens where all are prepared, else bytes of the training files. Raises DataError.

    The sizes are [] where they are known only when the run starts.
    """
    if all(source.prepared is not None for source in sources):
        return "by their tokens", [_prepared_tokens(source) for source in sources]
    unknown = [source for source in sources if not source.shards or not source.has_sizes]
    if not resolve and unknown and not any(source.shards for source in unknown):
        return "by the bytes of their files, known when the run starts", []
    if unknown:
        raise DataError(
            f"--dataset {dataset}: without weights the sizes of the data sets decide, and the size of "
            f"{', '.join(source.dataset for source in unknown)} is unknown; give each a weight (NAME:0.5), or a local copy "
            "(`python -m peft_pretraining data fetch`)"
        )
    sizes = [float(sum(shard.size_bytes or 0 for shard in source.shards)) for source in sources]
    if not all(sizes):
        empty = ", ".join(source.dataset for source, size in zip(sources, sizes, strict=True) if not size)
        raise DataError(f"--dataset {dataset}: the files of {empty} are empty; leave it out")
    kinds = {s.compression is not None or s.format == "parquet" for source in sources for s in source.shards}
    unequal = " (some compressed, some not: give weights to be exact)" if len(kinds) > 1 else ""
    return f"by the bytes of their files{unequal}", sizes


def _prepared_tokens(source: Source) -> float:
    folder = prepared_folder(source.dataset)
    assert folder is not None
    return float(read_manifest(folder, check_sizes=False).total(f"{source.split}_tokens"))


# --- The order and the state of a mixture ---


def data_orders(data: Source | Mixture, packing: bool, wanted: DataOrder | None) -> tuple[DataOrder, ...]:
    """The order of each source. A small source of a mixture has the global order also in the padded layout: it is read often.

    Raises DataError: `wanted` is global, and the size of a source is unknown.
    """
    return tuple(source.data_order(packing or len(data.sources) > 1, wanted) for source in data.sources)


def orders_text(data: Source | Mixture, orders: Sequence[DataOrder]) -> str:
    """Lines for the plan about the order of training data; empty where it costs nothing."""
    names: dict[str, list[str]] = {}
    for source, order in zip(data.sources, orders, strict=True):
        names.setdefault(order_text(source, order), []).append(source.dataset)
    single = len(data.sources) == 1
    return "\n".join(text if single else f"{', '.join(names[text])}: {text}" for text in names if text)


def same_source(source: Source, kept: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Returns the state that a checkpoint keeps of a source: of the same files, or else of the same name; None without one."""
    by_content = [each for each in kept if each["fingerprint"] == source.fingerprint]
    by_name = [each for each in kept if each["dataset"] == source.dataset]
    return next(iter(by_content + by_name), None)


def source_figures(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a run has read of each source, by its loader's merged state; empty for a single data set.

    share, weight: of the tokens, measured and asked for. passes: finished passes of the lanes, least and most.
    """
    figures = []
    total = sum(source["tokens"] for source in state.get("sources", ()))
    for number, source in enumerate(state.get("sources", ())):
        passes = [numbers[number][0] for numbers in state["lanes"].values()]
        bad = sum(count for kind, count in source["bad_records"].items() if kind != "empty")
        figures.append(
            {
                "dataset": source["dataset"],
                "weight": source["weight"],
                "share": source["tokens"] / max(1, total),
                "tokens": source["tokens"],
                "passes": (min(passes), max(passes)),
                "bad_records": bad,
            }
        )
    return figures


def source_lines(state: Mapping[str, Any]) -> list[str]:
    """`source_figures` in words, a line for each source."""
    lines = []
    for figures in source_figures(state):
        least, most = figures["passes"]
        passes = f"{least}" if least == most else f"{least} to {most}"
        lines.append(
            f"{figures['dataset']}: {figures['tokens']:,} tokens, {figures['share']:.2%} (asked {figures['weight']:.2%}), "
            f"{passes} finished passes, {figures['bad_records']:,} bad records"
        )
    return lines


# --- Which source gives the next sequence ---


class _Drawn(Protocol):
    @property
    def ids(self) -> Sized: ...


SequenceT = TypeVar("SequenceT", bound=_Drawn)


def mixed(
    streams: Sequence[Iterator[SequenceT]], weights: Sequence[float], offsets: Sequence[float], drawn: Sequence[int]
) -> Iterator[tuple[int, SequenceT]]:
    """Yields (source, its next sequence) endlessly, from the source that comes first: with the least (drawn + offset) / weight.

    drawn: tokens that the lane has taken from each source. offsets: tokens, from 0 to a sequence's length, which differ between
    lanes, so that lanes do not all turn to a source at once. The values (drawn + offset) / weight of two sources never differ by
    more than a sequence of one of them adds, so that shares of the tokens converge to the weights.
    """
    tokens = list(drawn)
    turns = [(taken + offset) / weight for taken, offset, weight in zip(tokens, offsets, weights, strict=True)]
    while True:
        source = turns.index(min(turns))
        sequence = next(streams[source])
        tokens[source] += len(sequence.ids)
        turns[source] = (tokens[source] + offsets[source]) / weights[source]
        yield source, sequence
