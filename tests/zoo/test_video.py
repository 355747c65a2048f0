"""Video models: pads and other rows change nothing, layouts against loops, frame encoders, spans, many tokens."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from seqzoo.blocks.mixers.softmax import SoftmaxAttention
from seqzoo.blocks.registry import list_mixers
from seqzoo.zoo import create_model, list_models, load_model, save_model
from seqzoo.zoo._frames import GivenFeatures, PixelPatches, create_frame_encoder
from seqzoo.zoo._video import VideoEncoder
from seqzoo.zoo.video import best_spans

OPTIONS = {
    "long_vq": {"codebook_size": 8, "chunk_size": 4},
    "mega": {"chunk_size": 4},
    "tcnca": {"chunk_size": 4, "kernel_size": 3, "dilation_factor": 2},
    "mamba2": {"head_dim": 8, "d_state": 8},
}
FEATURES = {"name": "features", "dim": 6}
PATCHES = {"name": "patches", "patch_size": 4, "tubelet": 2}
BUILT_IN = [m for m in list_mixers(pattern="self") if not m.startswith("test")]


def small(kind, **options):
    torch.manual_seed(0)
    mixer = options.pop("mixer", "softmax")
    if isinstance(mixer, str):
        mixer = {"name": mixer, **OPTIONS.get(mixer, {})}
    options = {"encoder": FEATURES, "dim": 16, "depth": 2, "mixer": mixer, **options}
    return create_model(f"video_{kind}_tiny", **options).eval().double()


def padded(model, row, places, length, *more):
    """The answer for a row whose frames stand at `places` of `length`, with noise elsewhere."""
    wide = torch.full((1, length, *row.shape[2:]), 7.0, dtype=torch.float64)
    wide[0, places] = row[0]
    mask = torch.zeros(1, length, dtype=torch.bool)
    mask[0, places] = True
    return model(wide, *more, mask=mask)


@pytest.mark.parametrize("mixer", BUILT_IN)
def test_pads_and_other_rows_change_nothing(mixer):
    classifier, grounder = small("classifier", mixer=mixer, num_classes=3), small("grounder", mixer=mixer, query_dim=6)
    x, query = torch.randn(3, 9, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    lengths = [9, 5, 1]
    mask = torch.arange(9) < torch.tensor(lengths).unsqueeze(1)
    noisy = x.masked_fill(~mask.unsqueeze(-1), float("nan"))
    with torch.no_grad():
        whole, found = classifier(noisy, mask), grounder(noisy, query, mask)
        for i, n in enumerate(lengths):
            alone = grounder(x[i : i + 1, :n], query[i : i + 1])
            torch.testing.assert_close(found.y[i, :n], alone.y[0], atol=1e-10, rtol=0)
            torch.testing.assert_close(found.boundaries[i, :n], alone.boundaries[0], atol=1e-10, rtol=0)
            assert not found.y[i, n:].any() and not found.boundaries[i, n:].any()
            torch.testing.assert_close(whole.y[i], classifier(x[i : i + 1, :n]).y[0], atol=1e-10, rtol=0)
        holes = padded(classifier, x[1:2, :5], [1, 3, 4, 7, 8], 11)
        torch.testing.assert_close(holes.y[0], whole.y[1], atol=1e-10, rtol=0)
    assert torch.equal(found.mask, mask)


@pytest.mark.parametrize(("layout", "space"), [("joint", None), ("factorised", "linear"), ("frames", None)])
def test_layouts_know_no_pads(layout, space):
    model = small("classifier", encoder=PATCHES, layout=layout, space_mixer=space, mixer=["s4d", "softmax"])
    x = torch.rand(2, 7, 8, 12, 3, dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor([[7], [3]])
    with torch.no_grad():
        both = model(x.masked_fill(~mask[:, :, None, None, None], 0.3), mask).y
        torch.testing.assert_close(both[:1], model(x[:1]).y, atol=1e-10, rtol=0)
        torch.testing.assert_close(both[1:], model(x[1:, :3]).y, atol=1e-10, rtol=0)
        assert not torch.allclose(both[1:], model(x[1:, :4]).y)


def test_what_stands_at_pads_reaches_no_gradient():
    x, mask = torch.randn(2, 5, 6, dtype=torch.float64), torch.arange(5) < torch.tensor([[5], [3]])
    grads = []
    for value in (0.0, float("nan")):
        model = small("classifier", input_norm=True)
        model(x.masked_fill(~mask.unsqueeze(-1), value), mask).y.sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_features_are_tokens_and_the_pooled_vector_is_their_mean():
    x, mask = torch.randn(2, 5, 2, 2, 6, dtype=torch.float64), torch.arange(5) < torch.tensor([[5], [3]])
    for layout, places in (("frames", 1), ("joint", 4), ("factorised", 4)):
        model = small("classifier", layout=layout)
        features, steps = model.forward_intermediates(x, mask)
        assert [tuple(f.shape) for f in (features, *steps)] == [(2, 5 * places, 16)] * 3
        mean = torch.stack([features[0].mean(0), features[1, : 3 * places].mean(0)])
        torch.testing.assert_close(model.embed(x, mask).y, mean)
        torch.testing.assert_close(model(x, mask).y, model.head(mean))
        assert not features[1, 3 * places :].any()


def test_examples_are_what_the_models_take():
    for name in ("video_classifier_tiny", "video_grounder_tiny", "vis4mer_tiny", "selective_s4_tiny"):
        for encoder in (FEATURES, PATCHES):
            model = create_model(name, encoder=encoder).eval()
            given = model.example_inputs(2)
            assert len(model(*given).y) == 2 and torch.equal(given[0], model.example_inputs(2)[0])
            assert model.input_spec["kind"] == ("frame features" if encoder is FEATURES else "frames")


def test_a_row_without_frames_leaves_the_others_alone():
    for layout in ("frames", "joint", "factorised"):
        model = small("classifier", layout=layout)
        x = torch.randn(2, 4, 2, 2, 6, dtype=torch.float64)
        mask = torch.tensor([[True] * 4, [False] * 4])
        y = model(x, mask).y
        torch.testing.assert_close(y[:1], model(x[:1]).y, atol=1e-10, rtol=0)
        assert torch.isfinite(y).all()


def test_patches_are_blocks_of_frames_rows_and_columns():
    frames = torch.randint(0, 256, (2, 5, 6, 9, 3), dtype=torch.uint8)
    x = PixelPatches(patch_size=3, tubelet=2)(frames, None)
    assert x.shape == (2, 3, 2, 3, 2 * 3 * 3 * 3)
    for b, t, r, c in itertools.product(range(2), range(3), range(2), range(3)):
        block = frames[b, 2 * t : 2 * t + 2, 3 * r : 3 * r + 3, 3 * c : 3 * c + 3].float() / 255 * 2 - 1
        want = torch.zeros(2, 3, 3, 3)
        want[: len(block)] = block  # what is missing of the last tubelet is grey
        torch.testing.assert_close(x[b, t, r, c], want.flatten())
    # uint8 and the same as numbers in [0, 1]
    assert torch.equal(x, PixelPatches(patch_size=3, tubelet=2)(frames.float() / 255, None))
    scaled = PixelPatches(patch_size=3, image_size=[6, 3])(torch.full((1, 1, 12, 12, 3), 0.5), None)
    assert scaled.shape == (1, 1, 2, 1, 27) and scaled.abs().max() < 1e-6


def test_joint_tokens_come_frame_by_frame_with_their_grid():
    seen = {}

    class Spy(SoftmaxAttention):
        def forward(self, x, context=None, **arguments):
            seen[arguments["grid"]] = x.shape[1]
            return super().forward(x, context, **arguments)

    x = torch.randn(2, 4, 2, 3, 6, dtype=torch.float64)
    for layout, want in (("joint", {(4, 2, 3): 24}), ("factorised", {None: 4, (2, 3): 6}), ("frames", {None: 4})):
        seen.clear()
        space = {"space_mixer": Spy} if layout == "factorised" else {}
        model = VideoEncoder(encoder=FEATURES, layout=layout, mixer=Spy, dim=8, depth=1, **space).double()
        tokens = model(x)
        assert seen == want and tokens.grid == ((4, 1, 1) if layout == "frames" else (4, 2, 3))
        embedded = model.embed(x).x
        model.position, model.grid_position = None, None
        vectors = x.mean((2, 3)) if layout == "frames" else x.reshape(2, 24, 6)
        torch.testing.assert_close(model.embed(x).x, model.proj(vectors))
        assert not torch.allclose(embedded, model.embed(x).x)


def test_positions_tell_frames_rows_and_columns():
    for position in ("sinusoidal", "learned"):
        model = VideoEncoder(encoder=FEATURES, layout="joint", dim=16, position=position, max_len=9)
        x = model.embed(torch.zeros(1, 4, 3, 3, 6)).x[0].detach()
        assert (torch.cdist(x, x) + torch.eye(36) > 1e-4).all()  # 36 places, 36 vectors
    with pytest.raises(ValueError, match="beyond max_len=9"):
        model.embed(torch.zeros(1, 10, 3, 3, 6))
    # the number of a frame counts real frames
    mask = torch.tensor([[False, True, True, False, True]])
    part = model.embed(torch.zeros(1, 5, 1, 1, 6), mask=mask).x[0, mask[0]]
    torch.testing.assert_close(part, model.embed(torch.zeros(1, 3, 1, 1, 6)).x[0])


def test_factorised_blocks_mix_across_frames_then_within_each():
    torch.manual_seed(0)
    model = VideoEncoder(encoder=FEATURES, layout="factorised", mixer="softmax", dim=8, depth=2).double().eval()
    tokens = model.embed(torch.randn(2, 3, 2, 2, 6, dtype=torch.float64))
    x = tokens.x.unflatten(1, (3, 4)).clone()
    back = model.backbone
    for across, within in zip(back.across, back.within, strict=True):
        for b, p in itertools.product(range(2), range(4)):
            x[b, :, p] = x[b, :, p] + across.mixer(across.norm_mixer(x[b : b + 1, :, p])).y[0]
        for b, t in itertools.product(range(2), range(3)):
            row = x[b : b + 1, t]
            row = row + within.mixer(within.norm_mixer(row)).y
            x[b, t] = (row + within.ffn(within.norm_ffn(row)))[0]
    torch.testing.assert_close(model.mix(tokens).x, back.norm(x).flatten(1, 2), atol=1e-10, rtol=0)
    for options in ({"mixer": ["softmax"] * 3}, {"space_mixer": []}):
        with pytest.raises(ValueError, match=next(iter(options))):
            VideoEncoder(encoder=FEATURES, layout="factorised", dim=8, depth=2, **options)


def test_mixers_that_use_the_grid_run_on_it():
    x = torch.randn(2, 4, 4, 4, 6, dtype=torch.float64)
    agent = {"name": "agent", "num_heads": 2, "num_agents": 4, "grid_size": [4, 4]}
    routed = {"name": "bi_level_routing", "num_heads": 2, "spatial": True, "num_regions": 2, "topk": 2}
    for layout, mixer, space in (
        ("factorised", "softmax", agent),
        ("factorised", "linear", routed),
        ("joint", routed, None),
    ):
        model = small("classifier", layout=layout, mixer=mixer, space_mixer=space)
        before = model(x).y
        # neighbours on the grid count: the same frames turned about give another answer, without positions too
        model.encoder.grid_position = None
        turned = model(x.transpose(2, 3)).y
        assert torch.isfinite(before).all() and not torch.allclose(model(x).y, turned)


def test_time_encoding_reads_the_seconds():
    model = small("classifier", time_encoding={"num_steps": 9, "seconds_per_step": 0.5})
    x, times = torch.randn(1, 3, 6, dtype=torch.float64), torch.tensor([[0.0, 0.6, 3.0]])
    plain = small("classifier")
    plain.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(model(x, times=times).y, plain(x).y)  # starts at zero
    torch.nn.init.normal_(model.encoder.time_encoding.table)
    tokens = model.encoder.embed(x, times=times).x - plain.encoder.embed(x).x
    torch.testing.assert_close(tokens[0], model.encoder.time_encoding.table[[1, 2, 7]])
    with pytest.raises(ValueError, match="needs the times"):
        model(x)
    with pytest.raises(ValueError, match="times have shape"):
        model(x, times=times[:, :2])


def test_many_tokens_stay_within_memory():
    """102,400 of them with a linear mixer; a quadratic one would need 42 GB for a single map of scores."""
    model = create_model(
        "video_classifier_tiny", encoder={"name": "features", "dim": 4}, layout="joint", mixer="linear", dim=8, depth=1
    )
    loss = model(torch.randn(1, 100, 32, 32, 4)).y.sum()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_frames_of_a_tubelet_share_their_answer():
    model = small("grounder", encoder=PATCHES, query_dim=5)
    x, query = torch.rand(1, 5, 4, 8, 3, dtype=torch.float64), torch.randn(1, 5, dtype=torch.float64)
    y = model(x, query).y[0]
    assert y.shape == (5,) and y[0] == y[1] and y[2] == y[3] and y[0] != y[2] != y[4]


def test_the_query_decides():
    model = small("grounder", query_dim=6)
    x, query = torch.randn(2, 5, 6, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    assert not torch.allclose(model(x, query).y, model(x, query.flip(0)).y)
    # the formula, frame by frame
    tokens, q = model.encoder.embed(x).x, model.query_proj(query)
    fused = torch.stack(
        [torch.stack([model.fuse(torch.cat((t, q[b], t * q[b]))) for t in tokens[b]]) for b in range(2)]
    )
    y = model.encoder.backbone(fused).y
    logits = torch.stack([torch.stack([model.head(torch.cat((v, v * q[b]))) for v in y[b]]) for b in range(2)])
    torch.testing.assert_close(torch.cat((model(x, query).y.unsqueeze(-1), model(x, query).boundaries), -1), logits)
    # of one space: the cosine enters with its own weight, which starts at zero
    base = model(x, query)
    with torch.no_grad():
        model.similarity.copy_(torch.tensor([2.0, 0.0, -1.0]))
    cosine = torch.stack([F.cosine_similarity(x[b], query[b : b + 1]) for b in range(2)])
    torch.testing.assert_close(model(x, query).y, base.y + 2 * cosine)
    torch.testing.assert_close(model(x, query).boundaries[..., 1], base.boundaries[..., 1] - cosine)
    assert small("grounder", query_dim=7).similarity is None
    assert small("grounder", query_dim=6, similarity=False).similarity is None
    with pytest.raises(ValueError, match=r"query has shape \(2, 5\), expected \(2, 6\)"):
        model(x, query[:, :5])
    rare = torch.sigmoid(small("grounder", query_dim=6).head.bias[0].detach())
    assert math.isclose(float(rare), 0.1, rel_tol=1e-6)


def test_best_spans_are_those_of_all_pairs():
    torch.manual_seed(0)
    logits = 2 * torch.randn(20, 9, 2)
    mask = torch.arange(9) < torch.randint(1, 10, (20, 1))
    spans, chance = best_spans(logits, mask)
    for row in range(20):
        n = int(mask[row].sum())
        first, last = logits[row, :n].softmax(0).unbind(1)
        best = max((float(first[i] * last[j]), i, j) for i in range(n) for j in range(i, n))
        assert spans[row].tolist() == list(best[1:]) and math.isclose(float(chance[row]), best[0], rel_tol=1e-5)
    assert best_spans(logits[:, :1])[0].tolist() == [[0, 0]] * 20


@pytest.mark.parametrize("name", list_models("video_*_tiny"))
@pytest.mark.parametrize("encoder", [FEATURES, PATCHES])
def test_every_parameter_learns_and_a_saved_model_loads(name, encoder, tmp_path):
    torch.manual_seed(0)
    options = {"query_dim": 6} if "grounder" in name else {}
    layout = "factorised" if encoder is PATCHES else "frames"
    model = create_model(name, encoder=encoder, layout=layout, time_encoding={}, mixer="softmax", **options)
    x = torch.rand(2, 5, 6) if encoder is FEATURES else torch.rand(2, 5, 8, 8, 3)
    given = (x, torch.randn(2, 6)) if options else (x,)
    times = torch.arange(5.0).expand(2, -1)
    out = model(*given, times=times)
    (out.y.square().sum() + (0 if out.boundaries is None else out.boundaries.square().sum())).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), key
    model.eval()
    save_model(model, tmp_path)
    torch.testing.assert_close(
        load_model(tmp_path)(*given, times=times).y, model(*given, times=times).y, atol=0, rtol=0
    )


def test_recomputing_changes_no_gradient():
    for layout in ("frames", "factorised"):
        model = small("classifier", layout=layout).train()
        x, grads = torch.randn(2, 4, 2, 2, 6, dtype=torch.float64), []
        for enable in (False, True):
            model.set_grad_checkpointing(enable)
            model.zero_grad()
            model(x).y.sum().backward()
            grads.append([p.grad.clone() for p in model.parameters()])
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other)


class TestImageModels:
    """Encoders of timm, without weights."""

    @pytest.fixture(autouse=True)
    def timm(self):
        pytest.importorskip("timm")

    def encoder(self, name="resnet10t", **options):
        torch.manual_seed(0)
        return create_frame_encoder({"name": name, "image_size": 32, **options})

    def test_frames_are_what_the_model_makes_of_each(self):
        frames = torch.randint(0, 256, (2, 3, 40, 32, 3), dtype=torch.uint8)
        mask = torch.tensor([[True, True, False], [False, True, True]])
        encoder = self.encoder(frame_batch=3).train()
        assert not encoder.model.training and not any(p.requires_grad for p in encoder.parameters())
        y = encoder(frames, mask)
        assert y.shape == (2, 3, 1, 1, encoder.dim) and not y[~mask].any() and not y.requires_grad
        picture = frames[1, 2].permute(2, 0, 1)[None].float() / 255
        picture = F.interpolate(picture, (32, 32), mode="bilinear", antialias=True)
        mean, std = (torch.tensor(encoder.model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
        want = encoder.model((picture - mean) / std)[0]
        torch.testing.assert_close(y[1, 2, 0, 0], want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(encoder(frames, None)[mask], y[mask], atol=1e-5, rtol=1e-5)

    def test_grids_of_convolutions_and_of_transformers(self):
        frames = torch.rand(1, 2, 32, 32, 3)
        pooled, grid = self.encoder()(frames, None), self.encoder(grid=True)(frames, None)
        assert grid.shape[2:4] == (1, 1) or grid.shape[2] > 1
        torch.testing.assert_close(grid.mean((2, 3)), pooled[:, :, 0, 0], atol=1e-5, rtol=1e-5)
        encoder = self.encoder("vit_tiny_patch16_224", grid=True, image_size=224)
        frames = torch.rand(1, 1, 224, 224, 3)
        y = encoder(frames, None)
        x = (frames[0].permute(0, 3, 1, 2) - 0.5) / 0.5
        tokens = encoder.model.forward_features(x)
        assert y.shape == (1, 1, 14, 14, 192) and torch.equal(y[0, 0, 3, 5], tokens[0, 1 + 3 * 14 + 5])

    def test_trained_or_frozen_within_a_model(self, tmp_path):
        frames = torch.rand(1, 2, 32, 32, 3)
        for frozen in (True, False):
            encoder = {"name": "resnet10t", "image_size": 32, "frozen": frozen}
            model = create_model("video_classifier_tiny", encoder=encoder).train()
            model(frames).y.sum().backward()
            own = [p.grad for p in model.encoder.frame_encoder.parameters()]
            assert all((g is None) == frozen for g in own)
        save_model(model, tmp_path)
        assert torch.equal(load_model(tmp_path)(frames).y, model.eval()(frames).y)

    def test_weights_from_files(self, tmp_path):
        from safetensors.torch import save_file

        encoder = self.encoder()
        torch.manual_seed(1)
        state = create_frame_encoder("resnet10t").model.state_dict()
        save_file(state, tmp_path / "a.safetensors")
        torch.save({**state, "fc.weight": torch.zeros(3, 3)}, tmp_path / "b.pth")
        torch.save({"epoch": 3, "state_dict": state}, tmp_path / "wrapped.pth")
        for file in ("a.safetensors", "b.pth", "wrapped.pth"):
            found = self.encoder(weights=str(tmp_path / file)).model.state_dict()
            assert all(torch.equal(found[k], state[k]) for k in state)
        assert not all(torch.equal(v, state[k]) for k, v in encoder.model.state_dict().items())
        save_file({"conv1.weight": torch.zeros(1)}, tmp_path / "c.safetensors")
        (tmp_path / "cut.pth").write_bytes((tmp_path / "b.pth").read_bytes()[:1000])
        (tmp_path / "cut.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:1000])
        torch.save([1, 2], tmp_path / "list.pth")
        for file, message in (
            ("c.safetensors", r"c.safetensors are not those of resnet10t: 0 of \d+ tensors fit"),
            ("d.pth", r"no weights at .*d.pth"),
            ("cut.pth", r"cut.pth cannot be read"),
            ("cut.safetensors", r"cut.safetensors cannot be read"),
            ("list.pth", r"list.pth is no state dict"),
        ):
            with pytest.raises(ValueError, match=message):
                self.encoder(weights=str(tmp_path / file))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "patchs"}, "neither features nor patches nor a model of timm"),
        ({"encoder": {"dim": 3}}, "has no name"),
        ({"encoder": {"name": "features", "patch_size": 3}}, "no option 'patch_size'; its options: dim"),
        ({"encoder": {"name": "patches", "patch_size": 0}}, "patch_size=0"),
        ({"encoder": {"name": "patches", "image_size": [1, 2, 3]}}, "image_size"),
        ({"layout": "factorized"}, "factorised"),
        ({"position": "learnt"}, "learned"),
        ({"space_mixer": "linear"}, "space_mixer is for layout='factorised'"),
        ({"pooling": "men"}, "mean"),
        ({"num_classes": -1}, "num_classes=-1"),
    ],
)
def test_bad_options_say_which_and_what_there_is(options, message):
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=message):
        create_model("video_classifier_tiny", **options)


def test_bad_frames_say_what_is_expected():
    model = small("classifier")
    for x, message in (
        (torch.zeros(2, 3, 5, dtype=torch.float64), "encoder.dim=6"),
        (torch.zeros(2, 3, 6, dtype=torch.int64), "floating"),
        (torch.zeros(2, 0, 6), "T of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            model(x)
    with pytest.raises(ValueError, match="expected bool"):
        model(torch.zeros(2, 3, 6), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"image_size=8 scales"):
        PixelPatches(patch_size=4)(torch.zeros(1, 1, 9, 8, 3), None)
    with pytest.raises(ValueError, match="uint8 or floating"):
        PixelPatches(patch_size=4)(torch.zeros(1, 1, 8, 8, 4), None)
    assert GivenFeatures(dim=2)(torch.zeros(1, 2, 2), None).shape == (1, 2, 1, 1, 2)
