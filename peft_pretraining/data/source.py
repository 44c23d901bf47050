"""Finds the files of a data set and the rule by which their documents belong to a split; reads no documents.

Imports neither torch nor datasets nor transformers, so that a dry run describes its data at once.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from peft_pretraining.config.dataset_list import DEMOS, NAMED, dataset_names
from peft_pretraining.config.files import PathError, expanded
from peft_pretraining.data import DataError
from peft_pretraining.data.demo import build_demo, demo_folder, demo_tokenizer_path
from peft_pretraining.data.files import (
    READING_RULES,
    Keep,
    Listing,
    RetryPolicy,
    Shard,
    Split,
    left_out_text,
    local_listing,
    split_files,
)
from peft_pretraining.data.prepared import (
    TOKENIZER_FOLDER,
    Manifest,
    PreparedShard,
    is_prepared,
    is_unfinished,
    read_manifest,
)

__all__ = ["READING_RULES", "DataError", "DataOrder", "RetryPolicy", "Shard", "Source", "Split", "default_lanes", "open_source"]

DataOrder = Literal["lanes", "global"]

C4_URL = "hf://datasets/allenai/c4/en"
C4_SHARDS = {"train": 1024, "validation": 8}
HELD_OUT_ONE_IN = 100
# Tokenising 32 MB of English takes a core 11 (T5) to 20 s, compressed about 3 times as long. Stated in --data_order's help.
GLOBAL_ORDER_BYTES = 32_000_000


@dataclass(frozen=True)
class PreparedWith:
    """The tokenizer that made the tokens of prepared data. vocab_size: all ids lie below. summary: of the data, in words."""

    name: str
    fingerprint: str
    vocab_size: int
    summary: str


@dataclass(frozen=True)
class Source:
    """Files of one split in their order, and the rule that says which of their documents belong to it.

    keep: "all" documents, or the "train" or "validation" side of the hold-out rule (records.is_held_out). prepared: set if the
    files hold tokens. rules: READING_RULES, or those with which an earlier run began. num_listed: data files of all splits.
    left_out: the end of a sentence about the files that are not read. fingerprint: equal for equal files, names and rules,
    wherever they lie; for local files it covers names, sizes, and the first and last 4 kB (where a compressed file has its
    checksum), for prepared ones their checksums. Immutable and picklable.
    """

    dataset: str
    split: Split
    shards: tuple[Shard, ...]
    keep: Keep
    text_field: str
    default_tokenizer: str
    location: str
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    prepared: PreparedWith | None = None
    rules: int = READING_RULES
    num_listed: int | None = None
    left_out: str = ""

    @property
    def fingerprint(self) -> str:
        files = [[shard.name, shard.size_bytes, shard.content_tag] for shard in self.shards]
        content: list[object] = [self.split, self.keep, self.text_field, files]
        if self.prepared is not None:
            content.append(self.prepared.fingerprint)
        if self.rules > 1 and any(shard.format == "text" for shard in self.shards):
            content.append(self.rules)
        return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()

    def with_text_field(self, name: str) -> "Source":
        """The source read from this field; prepared data keeps the field that it was prepared from."""
        return self if self.prepared is not None else replace(self, text_field=name)

    @property
    def sources(self) -> tuple["Source", ...]:
        """This source alone; a mixture has several."""
        return (self,)

    @property
    def is_remote(self) -> bool:
        return any(is_remote(shard.url) for shard in self.shards)

    @property
    def has_sizes(self) -> bool:
        """Whether the size of every file is known."""
        return all(shard.size_bytes is not None for shard in self.shards)

    def data_order(self, packing: bool, wanted: DataOrder | None = None) -> DataOrder:
        """The order of training data. wanted: `--data_order`; without it small packed data has the global order.

        Padded, each sequence is a document, of which lanes have about equally many; packed, one long document would unbalance
        them. Prepared data records its original's sizes, so that it has the original's order. Raises DataError.
        """
        if wanted == "global" and not self.has_sizes:
            raise DataError(
                f"--data_order global: the sizes of the files of {self.dataset} are unknown, and the global order holds all text "
                "in memory; use --data_order lanes, or a local copy (`python -m peft_pretraining data fetch`)"
            )
        size = sum(shard.size_bytes or 0 for shard in self.shards)
        small = self.has_sizes and 0 < size <= GLOBAL_ORDER_BYTES
        return wanted or ("global" if packing and small else "lanes")

    def describe(self) -> str:
        """One line for the plan: data set, split, files, place, hold-out rule."""
        if not self.shards:
            return f"{self.dataset} ({self.split}): files are listed when the run starts"
        if self.prepared is not None:
            return f"{self.dataset} ({self.split}): {self.prepared.summary}"
        sizes = [shard.size_bytes for shard in self.shards]
        known_size = f", {readable_bytes(sum(s for s in sizes if s is not None))}" if None not in sizes else ""
        of_listed = f" of {self.num_listed}" if self.num_listed not in (None, len(self.shards)) else ""
        plural = "s" if max(len(self.shards), self.num_listed or 0) > 1 else ""
        files = f"{len(self.shards)}{of_listed} file{plural}{known_size} in {self.location}"
        rule = {
            "all": "",
            "train": f", 1 document in {HELD_OUT_ONE_IN} held out",
            "validation": f", the 1 document in {HELD_OUT_ONE_IN} held out",
        }[self.keep]
        return f"{self.dataset} ({self.split}): {files}{rule}{self.left_out}"


def order_text(source: Source, order: DataOrder) -> str:
    """One line for the plan about the order of training data; empty for the order by lanes, which costs nothing at the start."""
    if order == "lanes":
        return ""
    cost = "read" if source.prepared is not None else "tokenised (a core takes 0.5 s per MB of plain text, 1.5 s compressed)"
    return f"global order, every document once per pass: all text is {cost} first, and held in memory"


def default_lanes(dataset: str) -> int:
    """Virtual readers where `--data_lanes` is not given: 64 divide C4's 1,024 files, 24 have many divisors.

    Prepared data has as many as its original, so that the order is the same. A list with C4 in it has 64.
    """
    return 64 if holds_c4(dataset) else 24


def holds_c4(dataset: str) -> bool:
    """Whether a data set, or one of a list, is C4 or was prepared from it."""
    return any(original_dataset(name) == "c4" for name in dataset_names(dataset))


def original_dataset(dataset: str) -> str:
    """Returns the data set that prepared data was made from; any other data set is returned unchanged."""
    folder = prepared_folder(dataset)
    if folder is None:
        return dataset
    try:
        return read_manifest(folder, check_sizes=False).job.dataset
    except DataError:
        # The error is reported when the data is opened.
        return dataset


def prepared_folder(dataset: str) -> Path | None:
    """The folder of a prepared data set, None for every other data set."""
    if dataset in NAMED or dataset.startswith("hub:") or is_remote(dataset):
        return None
    try:
        folder = _local_path(dataset)
    except DataError:
        # The error is reported when the data is opened.
        return None
    return folder if is_prepared(folder) else None


def open_source(
    dataset: str,
    split: Split,
    *,
    text_field: str = "text",
    cache_dir: str | Path | None = None,
    hold_out: bool = True,
    resolve: bool = True,
    rules: int = READING_RULES,
) -> Source:
    """Finds the files of a data set.

    Args:
        dataset: "c4" | a name in DEMOS | "hub:OWNER/NAME[/folder or pattern]" | local folder, file or glob | folder of prepared
            data | any fsspec address.
        split: chosen by whole words in the names of files, or else of their folders: train; validation, valid, val, dev; test.
            Without validation files, 1 document in 100 of the training files is held out.
        text_field: key (column) that holds a document's text in JSON and parquet files.
        cache_dir: where the demo is built (default: $SPARSE_LORA_CACHE or ~/.cache/sltrain).
        hold_out: False: if no names mark validation or test files, every document belongs to both splits; for a data set used
            only for evaluation.
        resolve: False: build nothing and use no network, for a dry run; unknown files are left out.
        rules: READING_RULES, or those that a run of an earlier version recorded.

    Raises:
        DataError: no such file, no match, unknown extension, no files for the split, no network, a damaged manifest, or a file
            that holds something else than data, such as a git-lfs pointer.
    """
    if split not in ("train", "validation"):
        raise DataError(f"split {split!r}: must be train or validation")
    tokenizer = "t5-base"
    if dataset == "c4":
        return Source(dataset, split, _c4_shards(split), "all", text_field, tokenizer, C4_URL, rules=rules)
    if (pieces := DEMOS.get(dataset)) is not None:
        folder = build_demo(cache_dir, pieces) if resolve else demo_folder(cache_dir, pieces)
        tokenizer, location = str(demo_tokenizer_path(folder)), str(folder)
        listing = local_listing(dataset, folder, rules) if folder.is_dir() else Listing()
    elif (prepared := prepared_folder(dataset)) is not None:
        return _prepared_source(dataset, prepared, split, text_field, hold_out)
    else:
        location, listing = _listed(dataset, rules, resolve)
    if not listing.shards:
        return Source(dataset, split, (), "all", text_field, tokenizer, location, rules=rules)
    chosen, keep = split_files(listing, split, dataset, hold_out, rules)
    if rules > 1:
        _refuse_other_content(dataset, chosen, listing)
    return Source(
        *(dataset, split, chosen, keep if hold_out else "all", text_field, tokenizer, location),
        rules=rules,
        num_listed=len(listing.shards),
        left_out="" if dataset in DEMOS else left_out_text(listing.left_out),
    )


def _listed(dataset: str, rules: int, resolve: bool) -> tuple[str, Listing]:
    """(location, files) of a folder, file, glob or address; resolve: False for no network. Raises DataError."""
    on_hub = dataset.startswith("hub:")
    if on_hub or is_remote(dataset):
        location = "hf://datasets/" + dataset.removeprefix("hub:").strip("/") if on_hub else dataset
        location = _expanded(dataset, location)
        if not resolve:
            return location, Listing()
        refuse_if_offline(location)
        from peft_pretraining.data.network import remote_listing

        return location, remote_listing(location, rules)
    path = _local_path(dataset)
    if is_unfinished(path):
        raise DataError(f"dataset {dataset!r}: its preparation has not finished; run `data prepare` again, which resumes it")
    return str(path), local_listing(dataset, path, rules)


def _refuse_other_content(dataset: str, chosen: Sequence[Shard], listing: Listing) -> None:
    """Raises DataError if files of a split hold something else than data: they would be lost, or be taken as text."""
    wrong = [shard for shard in chosen if shard.name in listing.problems]
    if wrong:
        more = f" (and so {'are' if len(wrong) > 2 else 'is'} {len(wrong) - 1} more of its {len(chosen)} files)"
        first = f"{wrong[0].url} {listing.problems[wrong[0].name]}"
        raise DataError(f"dataset {dataset!r}: {first}{more if len(wrong) > 1 else ''}")


def recorded_rules(run: Mapping[str, Any]) -> int:
    """The rules for files and splits of a run, from its run.json; versions before 2 did not record them."""
    recorded = run.get("dataset")
    rules = recorded.get("reading_rules", 1) if isinstance(recorded, Mapping) else 1
    return rules if rules in range(1, READING_RULES + 1) else READING_RULES


def is_remote(url: str) -> bool:
    """Whether an address goes through a network or another file system than the local one."""
    return "://" in url and not url.startswith(("file://", "local://"))


# --- Files ---


def _c4_shards(split: Split) -> tuple[Shard, ...]:
    # Built instead of listed, so that a dry run needs no network; the names have not changed since 2020.
    count = C4_SHARDS[split]
    names = [f"c4-{split}.{index:05d}-of-{count:05d}.json.gz" for index in range(count)]
    return tuple(Shard(f"{C4_URL}/{name}", name, "json", "gzip") for name in names)


def _local_path(dataset: str) -> Path:
    return Path(_expanded(dataset, dataset.removeprefix("file://").removeprefix("local://")))


def _expanded(dataset: str, path: str) -> str:
    try:
        return expanded(path)
    except PathError as error:
        raise DataError(f"dataset {dataset!r}: {error}") from None


def _prepared_source(dataset: str, folder: Path, split: Split, text_field: str, hold_out: bool) -> Source:
    manifest = read_manifest(folder)
    job = manifest.job
    if text_field not in ("text", job.text_field):
        raise DataError(
            f"--text_field {text_field}: {dataset} was prepared from the field {job.text_field!r}; leave the flag out"
        )
    chosen = [shard for shard in manifest.shards if shard.split in (split, "both")]
    if not sum(shard.counts[split] for shard in chosen):
        raise DataError(f"dataset {dataset!r}: no document of the {split} split was prepared")
    shards = tuple(
        Shard(
            str(folder / shard.ids.name),
            shard.name,
            "tokens",
            size_bytes=shard.size_bytes,
            content_tag=f"{shard.ids.checksum} {shard.index.checksum}",
        )
        for shard in chosen
    )
    uses_rule = hold_out and any(shard.split == "both" for shard in chosen)
    return Source(
        dataset,
        split,
        shards,
        split if uses_rule else "all",
        job.text_field,
        str(folder / TOKENIZER_FOLDER),
        str(folder),
        prepared=PreparedWith(job.tokenizer, job.tokenizer_fingerprint, manifest.vocab_size, _summary(manifest, chosen, split)),
    )


def _summary(manifest: Manifest, shards: Sequence[PreparedShard], split: Split) -> str:
    documents, tokens = (sum(shard.counts[name] for shard in shards) for name in (split, f"{split}_tokens"))
    files = f"{len(shards)} file{'s' if len(shards) > 1 else ''}"
    job = manifest.job
    return f"{documents:,} documents, {tokens:,} tokens of {job.tokenizer}, prepared from {job.dataset}, {files}"


def refuse_if_offline(url: str) -> None:
    """Raises DataError if `url` is on the hub and an environment variable forbids network access."""
    if not url.startswith("hf://"):
        return
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        if os.environ.get(variable, "").upper() in {"1", "ON", "YES", "TRUE"}:
            raise DataError(f"{url} is on the hub and {variable} is set: unset it, or give --dataset a local folder or demo")


def readable_bytes(count: int) -> str:
    """Returns a number of bytes with its unit, in powers of 1000."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"
