"""Every file format gives the same documents; problems of records are named, and damage loses no good record."""

import gzip
import json
from pathlib import Path

import pytest
from corpora import json_lines, texts

from peft_pretraining.data import DataError
from peft_pretraining.data.records import BadRecord, check_source, document_text, read_records
from peft_pretraining.data.source import open_source

zstandard = pytest.importorskip("zstandard")
DOCUMENTS = texts(700)


def read(path: Path, start: int = 0, **options):
    source = open_source(str(path), "train", hold_out=False, **options)
    return [
        (record, document_text(record, shard, source.text_field))
        for shard in source.shards
        for record in read_records(shard, source, start)
    ]


def parquet_bytes(tmp_path: Path) -> bytes:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "made.parquet.tmp"
    parquet.write_table(pyarrow.table({"id": list(range(700)), "text": DOCUMENTS}), path, row_group_size=100)
    return path.read_bytes()


CONTENTS = {
    "x.jsonl": lambda _: json_lines(DOCUMENTS),
    "x.json": lambda _: json_lines(DOCUMENTS),
    "x.json.gz": lambda _: gzip.compress(json_lines(DOCUMENTS)),
    "x.jsonl.gz": lambda _: gzip.compress(json_lines(DOCUMENTS)),
    "x.json.zst": lambda _: zstandard.compress(json_lines(DOCUMENTS)),
    # Two frames, as parallel compressors write them.
    "x.jsonl.zst": lambda _: zstandard.compress(json_lines(DOCUMENTS[:9])) + zstandard.compress(json_lines(DOCUMENTS[9:])),
    "x.txt": lambda _: "\n\n \n".join(DOCUMENTS).encode(),
    "x.txt.gz": lambda _: gzip.compress("\n\n".join(DOCUMENTS).encode()),
    "x.parquet": parquet_bytes,
}


@pytest.mark.parametrize("name", CONTENTS)
def test_every_format_gives_the_same_documents_from_any_start(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(CONTENTS[name](tmp_path))
    stripped = [text.rstrip() for text in DOCUMENTS]
    assert [text.rstrip() for _, text in read(path)] == stripped
    for start in (1, 99, 100, 250, 700):
        assert [(record.number, text.rstrip()) for record, text in read(path, start)] == list(enumerate(stripped[start:], start))


def test_fsspec_urls_are_read_like_local_files(tmp_path):
    import fsspec

    with fsspec.open("memory://corpus/a.json.gz", "wb") as file:
        file.write(gzip.compress(json_lines(DOCUMENTS[:5])))
    with fsspec.open("memory://corpus/b.jsonl", "wb") as file:
        file.write(json_lines(DOCUMENTS[5:9]))
    for address in ("memory://corpus", "memory://corpus/*", "memory://corpus/[ab].json*"):
        source = open_source(address, "train", hold_out=False)
        found = [document_text(record, shard, "text") for shard in source.shards for record in read_records(shard, source)]
        assert found == DOCUMENTS[:9]
    assert [shard.name for shard in source.shards] == ["a.json.gz", "b.jsonl"]


@pytest.mark.parametrize(
    ("line", "kind", "said"),
    [
        (b'{"text": "cut o', "malformed_json", "Unterminated string"),
        (b"not json", "malformed_json", "Expecting value"),
        (b'["a", "list"]', "malformed_json", "found a list"),
        (b"3", "malformed_json", "found a number"),
        (b'{"text": %s1}' % (b"9" * 5000), "malformed_json", "digits"),
        (b"[" * 100_000, "malformed_json", "recursion"),
        (b'{"content": "x", "url": 1}', "missing_text", "'content', 'url'"),
        (b'{"text": null}', "missing_text", "null"),
        (b'{"text": 3}', "text_not_string", "a number"),
        (b'{"text": {"a": 1}}', "text_not_string", "an object"),
        (b'{"text": "\xff\xfe"}', "invalid_unicode", "utf-8"),
        (rb'{"text": "\ud83d"}', "invalid_unicode", "surrogate"),
    ],
)
def test_a_bad_record_is_named_and_its_neighbours_are_read(tmp_path, line, kind, said):
    path = tmp_path / "x.jsonl"
    path.write_bytes(json_lines(["before"]) + b"\n" + line + b"\n" + json_lines(["after"]))
    (_, first), (record, bad), (_, last) = read(path)
    assert (first, last) == ("before", "after")
    assert isinstance(bad, BadRecord)
    assert bad.kind == kind
    assert said in bad.detail
    assert (record.number, record.line) == (1, 3)  # a blank line is not a record


def test_extra_columns_are_ignored_and_the_text_field_can_be_named(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"body": "one", "n": 1}\n{"body": "two", "other": [1, {"a": null}]}\n')
    assert [text for _, text in read(path, text_field="body")] == ["one", "two"]


@pytest.mark.parametrize("suffix", ["json.gz", "json.zst"])
@pytest.mark.parametrize("damage", ["truncated", "garbled", "not compressed"])
def test_a_damaged_file_gives_its_readable_records_and_one_bad_record(tmp_path, suffix, damage):
    compress = gzip.compress if suffix == "json.gz" else zstandard.ZstdCompressor(write_checksum=True).compress
    content = bytearray(compress(json_lines(texts(40_000))))
    if damage == "truncated":
        del content[-(len(content) // 3) :]
    elif damage == "garbled":
        content[len(content) // 2 : len(content) // 2 + 64] = bytes(64)
    else:
        content = bytearray(json_lines(texts(3)))
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(content)
    found = read(path)
    bad = [text for _, text in found if isinstance(text, BadRecord)]
    assert bad[-1].kind == "unreadable_rest"
    assert isinstance(found[-1][1], BadRecord)
    good = [text for _, text in found if isinstance(text, str)]
    assert good == texts(40_000)[: len(good)] or damage == "garbled"
    assert (len(good) > 10_000) == (damage != "not compressed")


def test_empty_files_have_no_records(tmp_path):
    for name in ("a.json.gz", "b.jsonl", "c.txt", "d.jsonl.zst"):
        (tmp_path / name).write_bytes(b"")
    assert read(tmp_path) == []
    with pytest.raises(DataError, match="all 4 files are empty"):
        check_source(open_source(str(tmp_path), "train"))


def test_a_missing_text_field_is_reported_with_the_existing_fields(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"content": "one", "id": 1}\n' * 5)
    with pytest.raises(DataError, match=r"line 1: missing text: no field 'text'; the fields are 'content', 'id'.*--text_field"):
        check_source(open_source(str(path), "train"))


def test_a_missing_parquet_column_is_reported_with_the_existing_columns(tmp_path):
    path = tmp_path / "x.parquet"
    path.write_bytes(parquet_bytes(tmp_path))
    with pytest.raises(DataError, match=r"no column 'body'; the columns are 'id', 'text'"):
        check_source(open_source(str(path), "train", text_field="body"))


@pytest.mark.parametrize("content", ['[{"text": "a"}, {"text": "b"}]', '[\n  {"text": "a"}\n]'])
def test_a_json_array_is_refused_with_the_way_out(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"x\.json holds a JSON array, not one object per line; convert it to \.jsonl"):
        check_source(open_source(str(path), "train"))


def test_a_bad_first_line_does_not_refuse_the_source(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"broken\n" + json_lines(["good"]))
    check_source(open_source(str(path), "train"))


def test_a_missing_file_of_a_source_is_named(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(json_lines(["one"]))
    source = open_source(str(path), "train")
    path.unlink()
    with pytest.raises(DataError, match=r"x\.jsonl cannot be read: No such file"):
        check_source(source)


def test_text_blocks_keep_their_lines_and_line_numbers(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("\n\nfirst line\n  second line\n\n\nnext\n")
    assert [(record.line, text) for record, text in read(path)] == [(3, "first line\n  second line"), (7, "next")]


def test_a_byte_order_mark_is_ignored(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"text": "ä"}).encode() + b"\n")
    assert [text for _, text in read(path)] == ["ä"]


@pytest.mark.parametrize("pack", [lambda content: content, gzip.compress, zstandard.compress])
def test_text_from_windows_is_the_same_text(tmp_path, pack):
    """Byte order mark and carriage returns are not part of the documents, however the file is compressed."""
    text = "\ufeff" + "\n\n".join(f"{document}\nsecond line" for document in DOCUMENTS[:9]) + "\n \n\ufefflast\n"
    suffix = {gzip.compress: ".gz", zstandard.compress: ".zst"}.get(pack, "")
    path = tmp_path / f"x.txt{suffix}"
    path.write_bytes(pack(text.replace("\n", "\r\n").encode()))
    assert [document for _, document in read(path)] == [f"{document}\nsecond line" for document in DOCUMENTS[:9]] + ["last"]
    assert read(path, rules=1)[0][1] == f"\ufeff{DOCUMENTS[0]}\r\nsecond line"  # what earlier runs were trained on


def test_json_with_a_byte_order_mark_and_carriage_returns(tmp_path):
    for content in (b"\xef\xbb\xbf" + json_lines(DOCUMENTS[:3]), b"\xef\xbb\xbf\r\n" + json_lines(DOCUMENTS[:3])):
        (tmp_path / "x.jsonl").write_bytes(content.replace(b"\n", b"\r\n"))
        assert [document for _, document in read(tmp_path / "x.jsonl")] == DOCUMENTS[:3]


@pytest.mark.parametrize("name", ["x.jsonl.zst", "x.txt.zst"])
def test_utf_16_inside_zstd_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(zstandard.compress(json_lines(DOCUMENTS[:3]).decode().encode("utf-16")))
    with pytest.raises(DataError, match="is UTF-16 text, not UTF-8"):
        check_source(open_source(str(tmp_path), "train"))


def test_binary_columns_that_are_utf_8_are_text_and_others_are_named(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    values = ["naïve".encode(), b"caf\xe9", None]
    for kind in (pyarrow.binary(), pyarrow.large_binary()):
        parquet.write_table(pyarrow.table({"text": pyarrow.array(values, kind)}), tmp_path / "x.parquet")
        first, second, third = (document for _, document in read(tmp_path / "x.parquet"))
        assert first == "naïve"
        assert (second.kind, third.kind) == ("invalid_unicode", "missing_text")
        assert "must be UTF-8" in second.detail
