"""Tokenizers from the hub, a folder or a SentencePiece model, and the encoding of documents of any length.

A document is data, so nothing in it may act as a control symbol: "</s>" in a web page is five characters, not the end of
the document, and T5's "<extra_id_0>" must not become id 32,099 of a 32,000-row embedding. `Tokenizer` therefore encodes
with a copy of the tokenizer's backend from which special tokens are removed.
"""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from peft_pretraining.config.files import PathError, beginning, encoding_problem, expanded, lfs_problem, read_text
from peft_pretraining.data import TokenizerError, causes, first_line

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer as Backend

PART_CHARACTERS = 2**18
_TOGETHER_CHARACTERS = 2**20  # encoded in one call, which uses several cores
_AROUND_CUT = 200  # characters on either side, to check whether a cut changes the ids
_TRIED_CUTS = 20
_BLANK_INSIDE = re.compile(r"(?<=\S)[ \n](?=\S)")

# Names of special tokens that end a document in published tokenizers.
_END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<\uff5cend\u2581of\u2581sentence\uff5c>")
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
Ids = Sequence[int] | np.ndarray
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
# What a fingerprint compares besides the vocabulary: spaces, line breaks, digits, rare characters, special-looking text.
PROBE = "A  probe:\n\tnaïve 123,456 — 你好 \U0001f600 </s> <extra_id_0> don't `x_1 = f(y)`"


class Tokenizer:
    """A transformers tokenizer whose `encode_batch` treats every text as plain text. Picklable.

    eos_id: ends every document. pad_id: fills the rest of a padded sequence (eos_id where the tokenizer has no padding
    token; losses ignore padding by position, never by id). text_vocab_size: one more than the largest id that training
    data can hold (text, eos, padding), the least vocabulary a model needs. vocab_size: all ids, special ones included.
    """

    def __init__(self, pretrained: Any, name: str):
        """Wraps a transformers tokenizer. Raises TokenizerError if it has no fast backend or no end-of-text token."""
        if not getattr(pretrained, "is_fast", False):
            raise TokenizerError(f"tokenizer {name!r} has no fast version (tokenizer.json); use one that has")
        if pretrained.eos_token_id is None:
            raise TokenizerError(
                f"tokenizer {name!r} has no eos token; pretraining needs one to end documents: put "
                '{"eos_token": "THE TOKEN"} into tokenizer_config.json beside tokenizer.json'
            )
        self.name = name
        self.eos_id: int = pretrained.eos_token_id
        self.pad_id: int = self.eos_id if pretrained.pad_token_id is None else pretrained.pad_token_id
        self._pretrained = pretrained
        unk_id = pretrained.unk_token_id
        control_ids = _control_ids(pretrained)
        # Unlike the other control symbols, unk also stands for ordinary text, for characters without a piece.
        self._special_ids: frozenset[int] = frozenset(control_ids - {unk_id})
        self._unk_id: int | None = unk_id
        self._backend = _plain_text_backend(pretrained.backend_tokenizer, control_ids)
        vocab = pretrained.get_vocab()
        self.vocab_size: int = max(vocab.values()) + 1
        self.text_vocab_size: int = 1 + max({*vocab.values()} - self._special_ids | {self.eos_id, self.pad_id})
        self._check_special_text_is_plain()
        self.fingerprint: str = self._fingerprint(vocab)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without eos or any other special id, whatever the text contains."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids; special ids and ids above the vocabulary are ignored."""
        ordinary = [int(i) for i in ids if int(i) not in self._special_ids and int(i) < self.vocab_size]
        return str(self._pretrained.backend_tokenizer.decode(ordinary, skip_special_tokens=False))

    def bytes_per_id(self) -> "torch.Tensor":
        """(vocab_size,) int64: UTF-8 bytes that each id stands for; special ids and unk 0, byte-fallback pieces 1.

        Summed over a text's ids this is the text's length after the tokenizer's own normalisation, plus one byte per
        document where the tokenizer puts a space before the first word.
        """
        import torch

        lengths = torch.zeros(self.vocab_size, dtype=torch.int64)
        byte_level = "ByteLevel" in json.dumps(json.loads(self._backend.to_str())["decoder"])
        for piece, index in self._pretrained.get_vocab().items():
            if index in self._special_ids or index == self._unk_id:
                continue
            if byte_level:
                # The piece has one printable character per byte.
                lengths[index] = len(piece)
            elif BYTE_PIECE.fullmatch(piece):
                lengths[index] = 1
            else:
                lengths[index] = len(piece.removeprefix("##").replace("\u2581", " ").encode())
        return lengths

    def save(self, folder: str | Path) -> None:
        """Write a folder that `load_tokenizer` and transformers' AutoTokenizer load, fingerprint included. Raises OSError."""
        write_tokenizer(self._pretrained, folder)

    def save_for_inference(self, folder: str | Path, max_length: int) -> None:
        """Write a folder that AutoTokenizer loads, whose ids of a text are those of training: nothing is added to them.

        T5's own tokenizer ends every text, and so a prompt, with the end token; others begin with one that no document had.
        Prompts of a batch are padded on the left. max_length: positions of the model. Raises OSError.
        """
        from tokenizers import Tokenizer as BackendTokenizer
        from transformers import PreTrainedTokenizerFast

        state = json.loads(self._pretrained.backend_tokenizer.to_str())
        state.update(truncation=None, padding=None, post_processor=None)
        tokens = {f"{role}_token": getattr(self._pretrained, f"{role}_token") for role in ("bos", "eos", "unk", "pad")}
        tokens["pad_token"] = tokens["pad_token"] or tokens["eos_token"]
        plain = PreTrainedTokenizerFast(
            tokenizer_object=BackendTokenizer.from_str(json.dumps(state)),
            clean_up_tokenization_spaces=False,
            model_max_length=max_length,
            padding_side="left",
            model_input_names=["input_ids", "attention_mask"],
            **{name: token for name, token in tokens.items() if token is not None},
        )
        # Said outright, because llama.cpp's default is to begin texts with a token.
        write_tokenizer(plain, folder, {"add_bos_token": False, "add_eos_token": False})

    def _check_special_text_is_plain(self) -> None:
        special = [token for token, index in self._pretrained.get_vocab().items() if index in self._special_ids]
        for token, ids in zip(special, self.encode_batch(special), strict=True):
            if self._special_ids.intersection(ids):
                raise TokenizerError(
                    f"tokenizer {self.name!r} turns the text {token!r} of a document into a control symbol; use another"
                )

    def _fingerprint(self, vocab: dict[str, int]) -> str:
        # Vocabulary and behaviour, not the file's bytes: these differ between library versions and after saving.
        content = [sorted(vocab.items()), self.eos_id, self.pad_id, self.encode_batch([PROBE])]
        return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def write_tokenizer(pretrained: Any, folder: str | Path, more_settings: Mapping[str, Any] | None = None) -> None:
    """Writes a transformers tokenizer to a folder that AutoTokenizer of transformers 4 and 5 loads. Raises OSError.

    Version 4 knows neither version 5's class of tokenizers without a model's name nor its list of extra special tokens.
    more_settings: added to tokenizer_config.json.
    """
    try:
        pretrained.save_pretrained(str(folder))
    except Exception as error:
        # The tokenizers package has no other class for a disk that is full.
        raise OSError(f"{folder}: the tokenizer could not be written ({error})") from None
    path = Path(folder) / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": list(pretrained.model_input_names)}
    if str(settings.get("tokenizer_class")).startswith(("Llama", "CodeLlama", "Gemma")):
        # Version 4 begins texts with bos unless told otherwise; version 5 does what tokenizer.json says.
        ids = pretrained("a")["input_ids"]
        settings |= {"add_bos_token": ids[0] == pretrained.bos_token_id, "add_eos_token": ids[-1] == pretrained.eos_token_id}
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    settings |= more_settings or {}
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """A tokenizer by hub name (`t5-base`), folder, tokenizer.json, or SentencePiece `.model` file (or a folder with one).

    Never runs code from the hub. Raises TokenizerError: nothing there, not readable, no network (at once when
    HF_HUB_OFFLINE is set and the tokenizer was never downloaded), no eos token.
    """
    name, path = str(name_or_path), tokenizer_path(name_or_path)
    if path.is_dir():
        if not (path / "tokenizer.json").exists() and not (path / "tokenizer_config.json").exists():
            models = sorted(path.glob("*.model"))
            if len(models) != 1:
                files = ", ".join(sorted(file.name for file in path.iterdir())[:5]) or "nothing"
                raise TokenizerError(
                    f"no tokenizer in {name}: neither tokenizer.json nor one SentencePiece .model file; it holds {files}"
                )
            return Tokenizer(_from_sentencepiece(models[0]), name)
        return Tokenizer(_from_folder(path), name)
    if path.is_file() and path.suffix.lower() == ".json":
        whole = path.name == "tokenizer.json" and (path.parent / "tokenizer_config.json").exists()
        return Tokenizer(_from_folder(path.parent) if whole else _from_json(path), name)
    if path.is_file():
        return Tokenizer(_from_sentencepiece(path), name)
    return Tokenizer(_from_hub(name), name)


def tokenizer_path(name_or_path: str | Path) -> Path:
    """Returns the path that a tokenizer's name stands for, which does not exist if it is a name on the hub.

    Raises TokenizerError: it cannot be a name on the hub, and there is no such file or folder.
    """
    name = str(name_or_path)
    try:
        path = Path(expanded(name))
    except PathError as error:
        raise TokenizerError(f"tokenizer {name!r}: {error}") from None
    local = path.suffix in (".model", ".json") or name.startswith((".", "/", "~")) or name.count("/") > 1
    if local and not path.exists():
        raise TokenizerError(f"tokenizer {name!r} not found: no such file or folder")
    return path


def _from_folder(path: Path) -> Any:
    from transformers import AutoTokenizer

    for file in (path / "tokenizer.json", path / "tokenizer_config.json"):
        head = beginning(file)
        problem = lfs_problem(head) or encoding_problem(head)
        if problem is None and head.startswith(b"\xef\xbb\xbf"):
            problem = "begins with a byte order mark, which the tokenizers library does not read; save it without"
        if problem is not None:
            raise TokenizerError(f"{file} {problem}")
    try:
        pretrained = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        # Parsers raise many types for damaged files.
        raise TokenizerError(f"cannot load a tokenizer from {path}: {first_line(error)}") from error
    return pretrained if (path / "tokenizer_config.json").exists() else _with_end_token(pretrained, path)


def _from_json(path: Path) -> Any:
    """A tokenizer.json of the tokenizers library, without a tokenizer_config.json."""
    from tokenizers import Tokenizer as BackendTokenizer
    from transformers import PreTrainedTokenizerFast

    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path} {error}") from None
    try:
        backend = BackendTokenizer.from_str(text)
    except Exception as error:
        # The tokenizers package has no other class.
        raise TokenizerError(
            f"{path} is not a tokenizer.json of the tokenizers library ({first_line(error)}); give that file, a folder with it, "
            "or a SentencePiece .model file"
        ) from error
    return _with_end_token(PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False), path)


def _with_end_token(pretrained: Any, path: Path) -> Any:
    """The tokenizer with an end token: tokenizer.json does not say which special token ends a document, its names do.

    Raises TokenizerError: several of the special tokens have such a name.
    """
    special = {token.content for token in pretrained.added_tokens_decoder.values() if token.special}
    ends = [name for name in _END_TOKENS if name in special]
    if pretrained.eos_token_id is None and len(ends) > 1:
        raise TokenizerError(
            f'{path}: any of {", ".join(ends)} may end a document; put {{"eos_token": "{ends[0]}"}}, or another of them, into '
            "tokenizer_config.json beside tokenizer.json"
        )
    if pretrained.eos_token_id is None and ends:
        pretrained.eos_token = ends[0]
    return pretrained


def _from_hub(name: str) -> Any:
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
    from transformers import AutoTokenizer

    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    unreachable = None if offline else hub_problem()
    try:
        # Without this, a hub that cannot be reached costs a minute of retries, even if the tokenizer is in the cache.
        local_only = offline or unreachable is not None
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False, local_files_only=local_only)
    except Exception as error:
        # Connection errors come in many types, wrapped in an OSError or not.
        chain = list(causes(error))
        local_way = "or give --tokenizer a local folder or SentencePiece .model file"
        if any(isinstance(cause, RepositoryNotFoundError | HFValidationError) for cause in chain):
            raise TokenizerError(
                f"tokenizer {name!r} not found, neither here nor on the hub; check the name, {local_way}"
            ) from error
        if offline:
            raise TokenizerError(
                f"tokenizer {name!r} is not in the local cache and HF_HUB_OFFLINE is set; "
                f"download it once with a network, {local_way}"
            ) from error
        problem = unreachable or first_line(chain[-1])
        raise TokenizerError(
            f"cannot load tokenizer {name!r} from the hub ({problem}); check the network, {local_way}"
        ) from error


def hub_problem() -> str | None:
    """Why the hub cannot be reached, None if it can."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception as error:
        # The HTTP library's exceptions; it has changed between versions of huggingface_hub.
        return first_line(error)
    return None


# --- Special tokens out of reach of text ---


def _control_ids(pretrained: Any) -> set[int]:
    """Ids of control symbols, unk included: those the tokenizer names, and every added token marked special."""
    named = set(pretrained.all_special_ids)
    return named | {index for index, token in pretrained.added_tokens_decoder.items() if token.special}


def _plain_text_backend(backend: "Backend", control_ids: set[int]) -> "Backend":
    """A copy of a fast tokenizer that knows no special tokens: their names in a text are spelled with ordinary pieces."""
    from tokenizers import Tokenizer as BackendTokenizer

    state = json.loads(backend.to_str())
    state.update(truncation=None, padding=None, post_processor=None)
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] not in control_ids]
    model = state["model"]
    if model.get("type") == "Unigram":
        # The Unigram search runs over all its pieces, control symbols included. Text reaches the search with its spaces
        # replaced or split away, so a piece with a space in it is never found; its id stays taken.
        for index in control_ids:
            if index < len(model["vocab"]):
                model["vocab"][index][0] = f" control {index}"
        if model.get("byte_fallback"):
            # It would also find the byte piece <0x0A> in a text that spells it; byte pieces must keep their names.
            split = {
                "type": "Split",
                "pattern": {"Regex": "<(?=0x[0-9A-F]{2}>)"},
                "behavior": "Isolated",
                "invert": False,
            }
            steps = [step for step in (state["pre_tokenizer"], split) if step]
            state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    return BackendTokenizer.from_str(json.dumps(state))


# --- SentencePiece models ---


def _from_sentencepiece(path: Path) -> Any:
    """A SentencePiece model as a transformers tokenizer with the same segmentation (BPE and Unigram models)."""
    try:
        from sentencepiece import sentencepiece_model_pb2 as sentencepiece_format
    except ImportError as error:
        raise TokenizerError(f"reading {path} needs the packages sentencepiece and protobuf ({error})") from error
    from transformers import PreTrainedTokenizerFast

    head = beginning(path)
    if (problem := lfs_problem(head)) is not None:
        raise TokenizerError(f"{path} {problem}")
    if _TIKTOKEN_LINE.match(head):
        raise TokenizerError(
            f"{path} is a tiktoken vocabulary (a piece in base64 and its rank on each line), not a SentencePiece model; give the "
            "folder of the same model in transformers' layout, which has tokenizer.json, or convert it with "
            "transformers.integrations.tiktoken.convert_tiktoken_to_fast"
        )
    proto: Any = sentencepiece_format.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception as error:
        # Protobuf's DecodeError, or an unreadable file.
        raise TokenizerError(f"{path} is not a SentencePiece model: {first_line(error)}") from error
    if not proto.pieces:
        raise TokenizerError(f"{path} is not a SentencePiece model: it holds no pieces")
    if proto.trainer_spec.model_type not in (1, 2):
        raise TokenizerError(f"{path}: only SentencePiece models of type unigram and bpe are supported")
    trainer = proto.trainer_spec
    names = {
        f"{role}_token": proto.pieces[index].piece
        for role, index in (
            ("pad", trainer.pad_id),
            ("eos", trainer.eos_id),
            ("unk", trainer.unk_id),
            ("bos", trainer.bos_id),
        )
        if 0 <= index < len(proto.pieces)
    }
    return PreTrainedTokenizerFast(tokenizer_object=_sentencepiece_backend(proto), clean_up_tokenization_spaces=False, **names)


def _sentencepiece_backend(proto: Any) -> "Backend":
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as BackendTokenizer

    # Kind 6, byte pieces, is recognised by name.
    normal, unknown, control, user_defined, unused = 1, 2, 3, 4, 5
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    kinds = [piece.type for piece in proto.pieces]
    unk = kinds.index(unknown)
    model: Any
    if proto.trainer_spec.model_type == 1:
        model = models.Unigram(pieces, unk, byte_fallback=proto.trainer_spec.byte_fallback)
    else:
        vocab = {piece: index for index, (piece, _) in enumerate(pieces)}
        mergeable = {piece: score for (piece, score), kind in zip(pieces, kinds, strict=True) if kind == normal}
        byte_fallback = proto.trainer_spec.byte_fallback
        model = models.BPE(vocab, _merges(mergeable), unk_token=pieces[unk][0], fuse_unk=True, byte_fallback=byte_fallback)
    backend = BackendTokenizer(model)
    spec = proto.normalizer_spec
    steps: list[Any] = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Prepend("\u2581")] if spec.add_dummy_prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    if not any("\u2581" in piece.lstrip("\u2581") for piece, _ in pieces):
        # No piece has a space after a letter, so words can be segmented one by one, which is faster, with one result.
        backend.pre_tokenizer = pre_tokenizers.Split(Regex("\u2581*[^\u2581]+"), "isolated")
    first_space = [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
    spaces = decoders.Replace("\u2581", " ")
    backend.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), *first_space])
    for (piece, _), kind in zip(pieces, kinds, strict=True):
        if kind in (control, unknown, unused):
            backend.add_special_tokens([AddedToken(piece, special=True, normalized=False)])
        elif kind == user_defined and len(piece) > 1:
            # One character stands for itself without help.
            backend.add_tokens([AddedToken(piece, special=False, normalized=False)])
    return backend


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """The BPE merges that a SentencePiece vocabulary implies: any two pieces whose concatenation is a piece, best first."""
    merges = []
    for order, (piece, score) in enumerate(scores.items()):
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                merges.append((-score, order, cut, (left, right)))
    return [pair for *_, pair in sorted(merges)]


# --- Documents to ids in bounded memory ---
#
# A fast tokenizer holds about 80 bytes per character of what it encodes at once, so a document of 50 MB would take 4 GB. A long
# text is therefore cut at single spaces or line breaks inside it. At each cut the text around it is encoded whole and in two
# parts; only a cut where both give the same ids is used, so the ids are those of the whole text. A stretch without such a
# place (no blank in a quarter of a million characters) is cut where the part is full, which can split one word differently.


class Encoder(Protocol):
    """The part of a Tokenizer that encoding needs."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...


def encode_documents(tokenizer: Encoder, documents: Sequence[str | np.ndarray], enough: int | None = None) -> Iterator[Ids]:
    """The ids of each document, without eos; documents that are ids already (prepared data) are returned as they are.

    enough: number of ids needed of a document; of a long document only the parts that contain them are encoded.
    """
    return itertools.chain.from_iterable(_encoded_batches(tokenizer, documents, enough))


def _encoded_batches(tokenizer: Encoder, documents: Sequence[str | np.ndarray], enough: int | None) -> Iterator[list[Ids]]:
    """The ids of all documents, in batches of at most _TOGETHER_CHARACTERS; a long document is a batch of its own."""
    together: list[str | np.ndarray] = []
    characters = 0
    for document in documents:
        size = len(document) if isinstance(document, str) else 0
        if together and characters + size > _TOGETHER_CHARACTERS:
            yield _encode_together(tokenizer, together)
            together, characters = [], 0
        if size > PART_CHARACTERS and isinstance(document, str):
            yield _encode_together(tokenizer, together)
            together, characters = [], 0
            yield [_encode_long(tokenizer, document, enough)]
        else:
            together.append(document)
            characters += size
    yield _encode_together(tokenizer, together)


def _encode_together(tokenizer: Encoder, documents: Sequence[str | np.ndarray]) -> list[Ids]:
    texts = [document for document in documents if isinstance(document, str)]
    encoded = iter(tokenizer.encode_batch(texts) if texts else [])
    return [next(encoded) if isinstance(document, str) else document for document in documents]


def _encode_long(tokenizer: Encoder, text: str, enough: int | None) -> np.ndarray:
    parts, count = [], 0
    for part in _parts(tokenizer, text):
        parts.append(np.array(tokenizer.encode_batch([part])[0], dtype=np.int32))
        count += len(parts[-1])
        if enough is not None and count >= enough:
            break
    return np.concatenate(parts)


def _parts(tokenizer: Encoder, text: str) -> Iterator[str]:
    first = 0
    while len(text) - first > PART_CHARACTERS:
        end, following = _cut(tokenizer, text, first)
        yield text[first:end]
        first = following
    yield text[first:]


def _cut(tokenizer: Encoder, text: str, first: int) -> tuple[int, int]:
    """(end of the part that begins at `first`, begin of the next part): the blank between may belong to neither."""
    full = first + PART_CHARACTERS
    blanks = list(_BLANK_INSIDE.finditer(text, max(first + 1, full - PART_CHARACTERS // 2), full))
    for blank in blanks[: -_TRIED_CUTS - 1 : -1]:
        at = blank.start()
        before, after = text[max(first, at - _AROUND_CUT) : at], text[at + 1 : at + 1 + _AROUND_CUT]
        whole, left, with_blank, without = tokenizer.encode_batch([before + blank[0] + after, before, blank[0] + after, after])
        if left + with_blank == whole:
            return at, at
        if left + without == whole:
            return at, at + 1
    return full, full
