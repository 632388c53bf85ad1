"""Tokens: the small model's words, and CLIP's byte pairs from vocab.json and merges.txt, never from the network."""

import json

import pytest

from emilie_min.checkpoint.tokenizer import Tokenizer
from emilie_min.config import TextConfig, load_config
from emilie_min.errors import InstructionError, TokenizerError
from emilie_min.text import TextEncoder

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
MARKS = ["<|startoftext|>", "<|endoftext|>"]
MERGES = [("i", "t</w>"), ("m", "a"), ("k", "e</w>"), ("ma", "ke</w>")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer in the released one's format: bytes, bytes that end a word, merges, two marks."""
    path = tmp_path_factory.mktemp("tokenizer")
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    units = [chr(b) for b in shown] + [chr(256 + i) for i in range(256 - len(shown))]
    vocab = [*units, *(u + "</w>" for u in units), *map("".join, MERGES), *MARKS]
    (path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
    (path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, MERGES)) + "\n")
    return path


def encoder(*folders, **ids) -> TextEncoder:
    ids = {"vocab_size": 518, "bos_token_id": 516, "eos_token_id": 517, "pad_token_id": 517, **ids}
    config = TextConfig(**SMALL, **ids, version="nobody/nothing")
    return TextEncoder(config, Tokenizer(config, folders))


def test_clip_tokens_are_merged_marked_and_padded(folder, tmp_path):
    rows = encoder(tmp_path, folder).tokenize(["Make  it", ""])  # the first folder has none
    assert rows.shape == (2, 77)
    assert rows[0].tolist() == [516, 515, 512] + [517] * 74
    assert rows[1].tolist() == [516] + [517] * 76


def test_clip_length(folder):
    text = encoder(folder)
    assert text.tokenize(["make " * 75])[0, 75:].tolist() == [515, 517]
    with pytest.raises(InstructionError, match='77 tokens and the model reads 75.*would be cut: "it it"'):
        text.tokenize(["make " * 75 + "it it"])
    assert text.tokenize(["make " * 75 + "it it"], truncate=True)[0].tolist() == [516] + [515] * 75 + [517]


def test_no_tokenizer_says_what_to_fetch(tmp_path):
    text = encoder(tmp_path)  # loading needs none
    with pytest.raises(TokenizerError, match="vocab.json and merges.txt.*emilie download --tokenizer"):
        text.tokenize(["make it night"])


def test_the_hubs_cache_is_searched(folder, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--nobody--nothing" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for name in ("vocab.json", "merges.txt"):
        (snapshot / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "models--nobody--nothing" / "refs").mkdir()
    (tmp_path / "models--nobody--nothing" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert encoder().tokenize(["make"])[0, 1] == 515


def test_another_models_tokenizer(folder):
    with pytest.raises(TokenizerError, match="another model's"):
        encoder(folder, vocab_size=100).tokenize(["make it"])


@pytest.mark.parametrize("change", [lambda v: v.pop("<|endoftext|>"), lambda v: v.clear()])
def test_a_vocabulary_without_the_end_token(folder, tmp_path, change):
    vocab = json.loads((folder / "vocab.json").read_text())
    change(vocab)
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_bytes((folder / "merges.txt").read_bytes())
    with pytest.raises(TokenizerError, match="no <.endoftext.>.*emilie download --tokenizer"):
        encoder(tmp_path).tokenize(["make it"])


@pytest.mark.parametrize("number", [[1], "5", 1.0, True, 0, 600, -1])
def test_a_vocabulary_with_a_number_that_is_none(folder, tmp_path, number):
    vocab = json.loads((folder / "vocab.json").read_text()) | {"b": number}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_bytes((folder / "merges.txt").read_bytes())
    with pytest.raises(TokenizerError, match="does not number its tokens from 0 on, each once"):
        encoder(tmp_path).tokenize(["make it"])


def test_a_vocabulary_that_lacks_what_an_instruction_needs(folder, tmp_path):
    vocab = {token: i for i, token in enumerate([*"makeit", "it</w>", "ma", "ke</w>", "make</w>", *MARKS])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab | {"t</w>": len(vocab), "e</w>": len(vocab) + 1}))
    (tmp_path / "merges.txt").write_bytes((folder / "merges.txt").read_bytes())
    assert encoder(tmp_path).tokenize(["make it"])[0, 1:3].tolist() == [vocab["make</w>"], vocab["it</w>"]]
    with pytest.raises(TokenizerError, match='lacks tokens for "make it red": it is damaged, or not CLIP'):
        encoder(tmp_path).tokenize(["make it red"])


@pytest.mark.parametrize("content", [b"", b"[1]", b"3", b"{\x1b[2J", b"\xff", b"[" * 100_000])
def test_tokenizer_files_that_are_none(folder, tmp_path, content):
    (tmp_path / "vocab.json").write_bytes(content)
    (tmp_path / "merges.txt").write_bytes((folder / "merges.txt").read_bytes())
    with pytest.raises(TokenizerError, match="cannot be read") as caught:
        encoder(tmp_path).tokenize(["make it"])
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600


def test_texts_that_are_no_text(folder):
    with pytest.raises(InstructionError, match="half a character"):
        encoder(folder).tokenize(["make \ud83d it"])
    with pytest.raises(InstructionError) as caught:
        encoder(folder).tokenize(["make it " * 100_000])
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("version", ["", "..", "a b", "a/b/c", "a\x1b[2J"])
def test_a_version_that_no_hub_model_can_have(version):
    config = TextConfig(**SMALL, version=version)
    with pytest.raises(TokenizerError, match="emilie download --tokenizer") as caught:
        Tokenizer(config)(["make it"])
    assert str(caught.value).isprintable()


def test_small_models_words():
    params = load_config("toy").text
    text = TextEncoder(params, Tokenizer(params))
    row = text.tokenize(["Make it night."])[0].tolist()
    assert row[:5] == [62, *(params.words.index(w) for w in ("make", "it", "night")), 63] and set(row[5:]) == {63}
    with pytest.raises(InstructionError, match="does not know 'winter'; its words are: a add .* yellow"):
        text.tokenize(["make it winter"])
    for words in ("w" * 10**6, "winter " * 10**5, "\x1b[2J"):
        with pytest.raises(InstructionError, match="does not know") as caught:
            text.tokenize([words])
        assert str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_the_small_models_config_knows_the_worlds_words():
    from emilie_min.toy import world

    assert tuple(load_config("toy").text.words) == world.VOCABULARY
