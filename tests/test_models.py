"""The reference's models against transformers, torch, and their own differences."""

import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from gaugeblock.benchmarks import reference_speed
from torch import nn

from gaugeblock import reference

SIZES = dict(n_layer=2, n_head=2, n_embd=12, n_positions=16, vocab_size=23)
KINDS = {
    "gpt2": (transformers.GPT2Config, "GPT2"),
    "openai-gpt": (transformers.OpenAIGPTConfig, "OpenAIGPT"),
}
BOTH = pytest.mark.parametrize("kind", KINDS)
# a bias of all choices' scores moves no choice: its gradient is what rounding leaves of Σ p − 1
FLAT = {"multiple_choice_head.summary.bias": 1e-15}
SCALES = pytest.mark.parametrize("scale", [0.02, 0.2])


def randomised(model, scale, seed=0):
    """Every parameter random: default ones hide a missing bias, a wrong GELU, a missing scale."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=draw, dtype=p.dtype))
    return model.double().eval()


def peer(kind, head, scale, **options):
    """A model of transformers in float64."""
    kind, name = KINDS[kind]
    # the usual special tokens lie outside so small a vocabulary
    config = kind(**{**SIZES, "bos_token_id": None, "eos_token_id": None, **options})
    # some models change the configuration that they are given
    return randomised(getattr(transformers, name + head)(copy.deepcopy(config)), scale)


def loaded(model, directory):
    model.save_pretrained(directory)
    return reference.GPT.from_pretrained(directory)


def drawn(shape, below=SIZES["vocab_size"], seed=0):
    return np.random.default_rng(seed).integers(0, below, shape)


def tensors(*arrays):
    return [torch.from_numpy(np.asarray(a)) for a in arrays]


def close(mine, theirs, rtol=1e-10, floor=0.0):
    theirs = torch.as_tensor(theirs).detach().numpy()
    atol = rtol * np.abs(theirs).max() + floor
    np.testing.assert_allclose(mine, theirs, rtol=rtol, atol=atol)


def close_gradients(mine, theirs):
    """Every gradient of ours is the one of its name, and none is left out."""
    if isinstance(theirs, nn.Module):
        named = theirs.named_parameters()
        theirs = {k.removeprefix("transformer."): p.grad for k, p in named}
    assert set(mine) == set(theirs)
    for key, g in mine.items():
        close(g, theirs[key], floor=FLAT.get(key, 0.0))


def cross_entropy(logits, targets, **options):
    """In float64; transformers' own is in float32."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), **options)


@BOTH
@SCALES
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_language_models_agree_with_transformers(kind, scale, tied, tmp_path):
    theirs = peer(kind, "LMHeadModel", scale, tie_word_embeddings=tied)
    model = loaded(theirs, tmp_path)
    ids, targets = drawn((2, 9)), drawn((2, 9), seed=1)
    targets[0, 3] = -100
    ids_, targets_ = tensors(ids, targets)
    logits = theirs(ids_).logits
    want = cross_entropy(logits, targets_, label_smoothing=0.1)
    want.backward()
    close(model(ids), logits)
    loss, gradients = model.loss_and_gradients(ids, targets, label_smoothing=0.1)
    close(loss, want)
    close_gradients(gradients, theirs)
    h, _ = model.hidden(ids)
    close(h, theirs.transformer(ids_)[0])


@BOTH
@pytest.mark.parametrize(
    ("afn", "act"), [("relu", "relu"), ("gelu", "gelu_new")], ids=["relu", "gelu"]
)
def test_activations_mean_what_each_directory_means(kind, afn, act, tmp_path):
    options = {"activation_function": act} if kind == "gpt2" else {"afn": afn}
    theirs = peer(kind, "LMHeadModel", 0.5, **options)
    ids = drawn((1, 7))
    close(loaded(theirs, tmp_path)(ids), theirs(*tensors(ids)).logits)


class Wide:
    """torch whose float32 is float64."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def test_banded_layers_agree_with_gpt_neo(monkeypatch):
    """GPT-Neo is GPT-3's pattern with separate q, k and v that have no bias and no scale."""
    # its attention is in float32, whatever the model is in
    monkeypatch.setattr(transformers.models.gpt_neo.modeling_gpt_neo, "torch", Wide())
    config = transformers.GPTNeoConfig(
        vocab_size=23, max_position_embeddings=16, hidden_size=12, num_layers=4, num_heads=2,
        attention_types=[[["global", "local"], 2]], window_size=3,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    theirs = randomised(transformers.GPTNeoForCausalLM(config), 0.3)
    found = {k.removeprefix("transformer."): p for k, p in theirs.named_parameters()}

    def ours(values):
        weights = {}
        for key, w in values.items():
            key = key.replace("attn.attention.", "attn.").replace("out_proj", "c_proj")
            w = w.detach().numpy()
            matrix = ".attn." in key or ".mlp." in key
            weights[key] = w.T if matrix and w.ndim > 1 else w
        for i in range(config.num_layers):
            parts = [weights.pop(f"h.{i}.attn.{x}_proj.weight") for x in "qkv"]
            weights[f"h.{i}.attn.c_attn.weight"] = np.concatenate(parts, 1)
        return weights

    windows = [None, 3, None, 3]
    shape = SIZES | {"n_layer": 4, "attention_windows": windows, "scale_attn_weights": False}
    model = reference.GPT(shape, ours(found))
    ids, targets = drawn((2, 11)), drawn((2, 11), seed=1)
    ids_, targets_ = tensors(ids, targets)
    logits = theirs(ids_).logits
    cross_entropy(logits, targets_).backward()
    close(model(ids), logits)
    wanted = ours({key: p.grad for key, p in found.items()})
    _, gradients = model.loss_and_gradients(ids, targets)
    close_gradients(gradients, wanted)
    dense = reference.GPT(shape | {"attention_windows": None}, model.weights)
    assert np.abs(dense(ids) - model(ids)).max() > 1e-3


@SCALES
def test_frames_agree_with_embeddings_given_to_transformers(scale):
    theirs = peer("gpt2", "LMHeadModel", scale)
    map_ = randomised(nn.Linear(5, 12), scale)
    weights = {k.removeprefix("transformer."): p for k, p in theirs.named_parameters()}
    weights |= {"frames.weight": map_.weight.T, "frames.bias": map_.bias}
    weights = {k: w.detach().numpy() for k, w in weights.items()}
    model = reference.GPT(theirs.config.to_dict() | {"n_frame_embd": 5}, weights)
    ids, targets = drawn((2, 6)), drawn((2, 10), seed=1)
    frames = np.random.default_rng(2).standard_normal((2, 4, 5))
    ids_, targets_, frames_ = tensors(ids, targets, frames)
    frames_.requires_grad_()
    wte = theirs.transformer.wte.weight
    logits = theirs(inputs_embeds=torch.cat([map_(frames_), wte[ids_]], 1)).logits
    want = cross_entropy(logits, targets_)
    want.backward()
    close(model(ids, frames), logits)
    loss, gradients = model.loss_and_gradients(ids, targets, frames)
    close(loss, want)
    close(gradients.pop("frames"), frames_.grad)
    close(gradients.pop("frames.weight"), map_.weight.grad.T)
    close(gradients.pop("frames.bias"), map_.bias.grad)
    close_gradients(gradients, theirs)
    # the map is a weight like any other, and text alone does not move it
    _, gradients = model.loss_and_gradients(ids, targets[:, :6])
    assert set(weights) - set(gradients) == {"frames.weight", "frames.bias"}
    close(model(ids), theirs(ids_).logits)


def text_loss(hidden, ids, mask, head):
    """GPT-1's auxiliary loss, sequence after sequence."""
    losses = []
    for h, tokens, kept in zip(hidden, ids, mask.bool()):
        every = F.cross_entropy((h @ head.T)[:-1], tokens[1:], reduction="none")
        losses.append(every[kept[1:]].mean())
    return torch.stack(losses).mean()


def padded(*shape):
    """ids, where each sequence ends, and the mask of what comes before."""
    ids = drawn((*shape, 9), below=22)
    ends = drawn(shape, below=5, seed=3) + 4
    mask = np.arange(9) <= ends[..., None]
    # the vocabulary's last is the padding
    return np.where(mask, ids, 22), ends, mask.astype(int)


@BOTH
@SCALES
@pytest.mark.parametrize("lm_coef", [0, 0.5])
def test_classification_agrees_with_transformers(kind, scale, lm_coef, tmp_path):
    theirs = peer(kind, "ForSequenceClassification", scale, num_labels=3, pad_token_id=22)
    model = loaded(theirs, tmp_path)
    ids, ends, mask = padded(4)
    labels = drawn(4, below=3)
    ids_, labels_, mask_ = tensors(ids, labels, mask)
    logits = theirs(ids_).logits
    head = next(theirs.transformer.parameters())
    want = cross_entropy(logits, labels_)
    if lm_coef:
        want = want + lm_coef * text_loss(theirs.transformer(ids_)[0], ids_, mask_, head)
    want.backward()
    h, _ = model.hidden(ids)
    close(reference.classification_head(h, ends, model["score.weight"])[0], logits)
    loss, gradients = model.task_loss_and_gradients(
        "classification", ids, ends, labels, mask, lm_coef
    )
    close(loss, want)
    close_gradients(gradients, theirs)


@BOTH
def test_similarity_adds_both_orders(kind, tmp_path):
    theirs = peer(kind, "ForSequenceClassification", 0.2, num_labels=2, pad_token_id=22)
    model = loaded(theirs, tmp_path)
    bias = np.array([0.3, -0.1])
    model = reference.GPT(json.loads((tmp_path / "config.json").read_text()),
                          model.weights | {"score.bias": bias})  # fmt: skip
    ids, ends, mask = padded(3, 2)
    labels = drawn(3, below=2)
    ids_, ends_, labels_, mask_, bias_ = tensors(ids, ends, labels, mask, bias)
    bias_.requires_grad_()
    hidden = theirs.transformer(ids_.flatten(0, 1))[0]
    last = hidden[torch.arange(6), ends_.flatten()].view(3, 2, 12)
    want = cross_entropy(theirs.score(last[:, 0] + last[:, 1]) + bias_, labels_)
    head = next(theirs.transformer.parameters())
    want = want + 0.5 * text_loss(hidden, ids_.flatten(0, 1), mask_.flatten(0, 1), head)
    want.backward()
    loss, gradients = model.task_loss_and_gradients("similarity", ids, ends, labels, mask)
    close(loss, want)
    close(gradients.pop("score.bias"), bias_.grad)
    close_gradients(gradients, theirs)
    swapped = model.task_loss_and_gradients(
        "similarity", ids[:, ::-1], ends[:, ::-1], labels, mask[:, ::-1]
    )
    close(swapped[0], loss)


@BOTH
@SCALES
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_multiple_choice_agrees_with_transformers(kind, scale, tied, tmp_path):
    theirs = peer(kind, "DoubleHeadsModel", scale, tie_word_embeddings=tied)
    model = loaded(theirs, tmp_path)
    ids, labels = drawn((2, 3, 9)), drawn(2, below=3)
    ends = drawn((2, 3), below=9)
    ids_, ends_, labels_ = tensors(ids, ends, labels)
    out = theirs(ids_, mc_token_ids=ends_)
    # without padding the mean over sequences is that over tokens
    text = cross_entropy(out.logits[..., :-1, :], ids_[..., 1:])
    want = cross_entropy(out.mc_logits, labels_) + 0.25 * text
    want.backward()
    loss, gradients = model.task_loss_and_gradients(
        "multiple_choice", ids, ends, labels, lm_coef=0.25
    )
    close(loss, want)
    close_gradients(gradients, theirs)


def test_biases_may_be_missing_anywhere():
    config = SIZES | {"tie_word_embeddings": False}
    weights = random_weights(config | {"lm_head_bias": True}, 0.3)
    ids, targets = drawn((2, 7)), drawn((2, 7), seed=1)
    biases = [key for key in weights if key.endswith(".bias")]
    zeros = weights | {key: np.zeros_like(weights[key]) for key in biases}
    bare = {key: w for key, w in weights.items() if key not in biases}
    want, wanted = reference.GPT(config, zeros).loss_and_gradients(ids, targets)
    loss, gradients = reference.GPT(config, bare).loss_and_gradients(ids, targets)
    close(loss, want)
    assert set(gradients) == set(bare)
    assert set(wanted) == set(weights)
    for key, g in gradients.items():
        close(g, wanted[key])
    # the head's is added to the logits
    logits = reference.GPT(config, bare | {"lm_head.bias": weights["lm_head.bias"]})(ids)
    close(logits - reference.GPT(config, bare)(ids), np.tile(weights["lm_head.bias"], (2, 7, 1)))
    assert set(reference.parameter_shapes(config | {"bias": False})) == set(bare)


def random_weights(config, scale=0.3, seed=0):
    rng = np.random.default_rng(seed)
    shapes = reference.parameter_shapes(config)
    return {key: scale * rng.standard_normal(shape) for key, shape in shapes.items()}


ENCODER_DECODER = dict(model_type="transformer", n_layer=2, n_head=2, n_embd=12, n_inner=20,
                       vocab_size=23)  # fmt: skip


def torch_attention(key, w, crosses):
    """nn.MultiheadAttention with our weights."""
    attention = nn.MultiheadAttention(12, 2, batch_first=True, dtype=torch.float64)
    parts = [f"{key}.q_attn", f"{key}.c_attn"] if crosses else [f"{key}.c_attn"]
    placed = {
        "in_proj_weight": torch.cat([w[f"{p}.weight"].T for p in parts]),
        "in_proj_bias": torch.cat([w[f"{p}.bias"] for p in parts]),
        "out_proj.weight": w[f"{key}.c_proj.weight"].T,
        "out_proj.bias": w[f"{key}.c_proj.bias"],
    }
    return lambda *x, **options: torch.func.functional_call(
        attention, placed, x, options | {"need_weights": False}
    )[0]


def torch_transformer(w, source, targets_in, lengths):
    """The logits, out of torch's own attention, norms and products."""

    def embedded(ids):
        table = torch.zeros(ids.shape[1], 12, dtype=torch.float64)
        for t in range(len(table)):
            for i in range(0, 12, 2):
                table[t, i] = math.sin(t / 10000 ** (i / 12))
                table[t, i + 1] = math.cos(t / 10000 ** (i / 12))
        return F.embedding(ids, w["wte.weight"]) * 12**0.5 + table

    def norm(key, x):
        return F.layer_norm(x, (12,), w[f"{key}.weight"], w[f"{key}.bias"])

    def affine(key, x):
        return F.linear(x, w[f"{key}.weight"].T, w[f"{key}.bias"])

    def fed(key, h):
        y = affine(f"{key}.mlp.c_proj", affine(f"{key}.mlp.c_fc", h).relu())
        return norm(f"{key}.ln_2", h + y)

    padding = torch.arange(source.shape[1]) >= lengths[:, None]
    future = torch.ones(targets_in.shape[1], targets_in.shape[1]).triu(1).bool()
    h = embedded(source)
    for i in range(2):
        key = f"encoder.h.{i}"
        attend = torch_attention(f"{key}.attn", w, False)
        h = norm(f"{key}.ln_1", h + attend(h, h, h, key_padding_mask=padding))
        h = fed(key, h)
    memory, h = h, embedded(targets_in)
    for i in range(2):
        key = f"decoder.h.{i}"
        attend = torch_attention(f"{key}.attn", w, False)
        h = norm(f"{key}.ln_1", h + attend(h, h, h, attn_mask=future))
        look = torch_attention(f"{key}.crossattention", w, True)
        y = look(h, memory, memory, key_padding_mask=padding)
        h = norm(f"{key}.ln_cross_attn", h + y)
        h = fed(key, h)
    head = w.get("lm_head.weight", w["wte.weight"])
    return h @ head.T + w.get("lm_head.bias", 0.0)


@SCALES
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_encoder_decoder_agrees_with_torch(scale, tied):
    config = ENCODER_DECODER | {"tie_word_embeddings": tied, "lm_head_bias": not tied}
    weights = random_weights(config, scale)
    model = reference.Transformer(config, weights)
    source, targets_in, targets = drawn((3, 7)), drawn((3, 5), seed=1), drawn((3, 5), seed=2)
    targets[1, 3:] = -100
    lengths = np.array([7, 2, 5])
    w = {key: torch.tensor(x, requires_grad=True) for key, x in weights.items()}
    logits = torch_transformer(w, *tensors(source, targets_in, lengths))
    want = cross_entropy(logits, torch.from_numpy(targets), label_smoothing=0.1)
    want.backward()
    close(model(source, targets_in, lengths), logits)
    loss, gradients = model.loss_and_gradients(
        source, targets_in, targets, lengths, label_smoothing=0.1
    )
    close(loss, want)
    close_gradients(gradients, {key: x.grad for key, x in w.items()})
    # without lengths nothing is padding
    whole = torch_transformer(w, *tensors(source, targets_in, np.array([7, 7, 7])))
    close(model(source, targets_in), whole)


VARIANTS = {
    "gpt2": SIZES,
    "relu": SIZES | {"activation_function": "relu"},
    "erf": SIZES | {"activation_function": "gelu"},
    "untied": SIZES | {"tie_word_embeddings": False, "lm_head_bias": True},
    "gpt1": SIZES | {"model_type": "openai-gpt"},
    "gpt3": SIZES | {"attention_windows": [None, 2]},
    "layer scale": SIZES | {"scale_attn_by_inverse_layer_idx": True},
    "frames": SIZES | {"n_frame_embd": 5},
    "classification": SIZES | {"architectures": ["GPT2ForSequenceClassification"]},
    "similarity": SIZES | {"architectures": ["GPT2ForSequenceClassification"],
                           "model_type": "openai-gpt", "score_bias": True},
    "multiple_choice": SIZES | {"architectures": ["GPT2DoubleHeadsModel"]},
    "encoder-decoder": ENCODER_DECODER,
}  # fmt: skip


def case_of(name):
    """A model, and a function of the model that gives its loss and gradients."""
    config = VARIANTS[name]
    weights = random_weights(config)
    ids, targets = drawn((2, 6)), drawn((2, 6), seed=1)
    if name == "encoder-decoder":
        model = reference.Transformer(config, weights)
        lengths = np.array([3, 6])
        return model, lambda: model.loss_and_gradients(ids, targets[:, :4], targets[:, :4], lengths)
    model = reference.GPT(config, weights)
    if name == "frames":
        frames = np.random.default_rng(2).standard_normal((2, 3, 5))
        targets = drawn((2, 9), seed=1)
        return model, lambda: model.loss_and_gradients(ids, targets, frames)
    if name in ("classification", "similarity", "multiple_choice"):
        shape = (2,) if name == "classification" else (2, 2)
        ids, ends, mask = padded(*shape)
        labels = np.array([1, 0])
        return model, lambda: model.task_loss_and_gradients(name, ids, ends, labels, mask)
    return model, lambda: model.loss_and_gradients(ids, targets)


@pytest.mark.filterwarnings("ignore:Casting complex values to real")
@pytest.mark.parametrize("name", VARIANTS)
def test_every_weight_has_its_slope(name):
    """Central differences, and a complex step, whose only error is rounding."""
    model, evaluate = case_of(name)
    _, gradients = evaluate()
    assert set(gradients) - {"frames"} == set(model.weights)
    rng = np.random.default_rng(5)
    for key, w in model.weights.items():
        direction = rng.standard_normal(w.shape)
        slope = (gradients[key] * direction).sum()
        terms = np.abs(gradients[key] * direction).sum()
        h, losses = 1e-5, []
        for step in (h, -h, 1e-30j):
            model.weights[key] = w + step * direction
            losses.append(evaluate()[0])
        model.weights[key] = w
        # h² of a third derivative that these sizes keep below 100, and the losses' rounding
        assert abs((losses[0] - losses[1]) / (2 * h) - slope) < 1e-8 + 1e-6 * terms, key
        assert abs(losses[2].imag / 1e-30 - slope) < 1e-12 * max(terms, 1e-3), key
        assert terms > 1e-9 or key in FLAT, f"{key}: the check could not have failed"


COUNTS = {
    (12, 768, 1024, 50257): 124_439_808,
    (96, 12288, 2048, 50257): 174_604_259_328,
}


@pytest.mark.parametrize("shape", COUNTS)
def test_parameters_are_counted_with_nothing_allocated(shape):
    n_layer, C, P, V = shape
    config = dict(n_layer=n_layer, n_head=12, n_embd=C, n_positions=P, vocab_size=V)
    assert reference.parameter_count(config) == COUNTS[shape]
    untied = reference.parameter_count(config | {"tie_word_embeddings": False})
    assert untied == COUNTS[shape] + V * C


@pytest.mark.parametrize(
    ("C", "F", "H", "count"),
    [(512, 2048, 8, 63_082_496), (1024, 4096, 16, 214_245_376)],
    ids=["base", "big"],
)
def test_the_transformers_of_the_paper(C, F, H, count):
    """65M and 213M in the paper's table 3, whose vocabulary had about 37000 tokens."""
    config = dict(model_type="transformer", n_layer=6, n_head=H, n_embd=C, n_inner=F,
                  vocab_size=37000)  # fmt: skip
    assert reference.parameter_count(config) == count
    with torch.device("meta"):
        theirs = nn.Transformer(C, H, 6, 6, F, batch_first=True)
    # torch's ends each stack with one more norm
    layers = sum(p.numel() for p in theirs.parameters()) - 4 * C
    assert count == layers + 37000 * C


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_are_those_of_a_directory(kind, tmp_path):
    from safetensors.numpy import load_file

    for head, options in (
        ("LMHeadModel", {"tie_word_embeddings": False}),
        ("ForSequenceClassification", {"num_labels": 5, "pad_token_id": 1}),
        ("DoubleHeadsModel", {}),
    ):
        peer(kind, head, 0.1, **options).save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        found = load_file(tmp_path / "model.safetensors")
        found = {k.removeprefix("transformer."): w.shape for k, w in found.items()}
        if "tokens_embed.weight" not in found and kind == "openai-gpt":
            # transformers keeps either name of a tied table
            found["tokens_embed.weight"] = found.pop("lm_head.weight")
        assert reference.parameter_shapes(config) == found


def test_ten_steps_of_training_are_torch_s(tmp_path):
    theirs = peer("gpt2", "LMHeadModel", 0.2)
    model = loaded(theirs, tmp_path)
    batches = list(zip(drawn((10, 2, 8)), drawn((10, 2, 8), seed=1)))
    groups = [
        [p for p in theirs.parameters() if (p.ndim > 1) == matrix] for matrix in (True, False)
    ]
    options = dict(betas=(0.9, 0.95), eps=1e-8)
    optimiser = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}],
        lr=1e-2, **options,
    )  # fmt: skip
    wanted, norms = [], []
    for step, batch in enumerate(batches, start=1):
        ids, targets = tensors(*batch)
        for group in optimiser.param_groups:
            group["lr"] = 1e-2 / step
        optimiser.zero_grad()
        loss = cross_entropy(theirs(ids).logits, targets)
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(theirs.parameters(), 0.5).item())
        optimiser.step()
        wanted.append(loss.item())
    losses = reference.train(
        model, batches, lr=lambda step: 1e-2 / step, weight_decay=0.1, max_norm=0.5, **options
    )
    assert max(norms) > 0.5
    close(losses, np.array(wanted))
    assert losses[0] - losses[-1] != 0
    for key, p in theirs.named_parameters():
        # √v is a rounding error where a gradient is one: the keys' bias moves no score
        if not key.endswith("c_attn.bias"):
            close(model[key.removeprefix("transformer.")], p, rtol=1e-8)


def test_the_reference_is_timed_beside_torch(tmp_path, capsys):
    out = tmp_path / "speed.json"
    reference_speed.main(
        ["--layers", "1", "--tokens", "3", "--rounds", "1", "--width", "24", "--out", str(out)]
    )
    found = json.loads(out.read_text())
    for which, many in (("first", 1), ("others", 3)):
        assert found[which]["times_s"].keys() == {"reference", "torch"}
        assert {len(s) for of in found[which]["times_s"].values() for s in of.values()} == {many}
        for direction, ratio in found[which]["ratio"].items():
            ours, theirs = (found[which]["median_s"][n][direction] for n in ("reference", "torch"))
            assert ratio == ours / theirs > 0
    assert capsys.readouterr().out.count("ratio") == 4


def test_nothing_is_timed_that_disagrees(monkeypatch):
    affine = reference_speed.Torch._affine
    monkeypatch.setattr(
        reference_speed.Torch, "_affine", lambda self, key, x: 1.01 * affine(self, key, x)
    )
    with pytest.raises(ValueError, match="logits must agree with torch"):
        reference_speed.main(["--layers", "1", "--tokens", "3", "--rounds", "1", "--width", "24"])


def test_a_model_learns_a_sentence():
    config = SIZES | {"model_type": "openai-gpt"}
    model = reference.GPT(config, random_weights(config, 0.1))
    sentence = drawn((1, 9))
    losses = reference.train(model, [(sentence[:, :-1], sentence[:, 1:])] * 120, lr=1e-2)
    assert losses[-1] < 0.05 < losses[0]


GPT1 = SIZES | {"model_type": "openai-gpt"}


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (SIZES, {"n_layer": 0}, "config n_layer must be a whole number ≥ 1, got 0"),
        (SIZES, {"n_head": 5}, "config n_head must divide n_embd = 12, got 5"),
        (SIZES, {"model_type": "llama"}, "model_type must be one of gpt2, openai-gpt, got 'llama'"),
        (SIZES, {"activation_function": "silu"}, "activation_function must be one of gelu_new"),
        (GPT1, {"afn": "silu"}, "config afn must be one of"),
        (SIZES, {"add_cross_attention": True}, "add_cross_attention must be False, got True"),
        (SIZES, {"attention_windows": 2}, "must be a list of n_layer = 2 entries, got 2"),
        (SIZES, {"attention_windows": [2]}, "must be a list of n_layer = 2 entries, got"),
        (SIZES, {"attention_windows": [2, 0]}, r"must hold null or whole numbers ≥ 1, got 0"),
        (SIZES, {"n_embd": 14}, r"wte.weight must have shape \(23, 14\), got \(23, 12\)"),
        (SIZES, {"n_layer": 3}, "weights must hold 'h.2.ln_1.weight', they do not"),
        (SIZES, {"n_layer": 1}, "must be those that the config calls for, got 'h.1"),
        (SIZES, {"bias": False}, "got 'h.0.ln_1.bias' too"),
        (SIZES, {"tie_word_embeddings": False}, "weights must hold 'lm_head.weight'"),
        (ENCODER_DECODER, {"n_inner": 10}, r"c_fc.weight must have shape \(12, 10\)"),
    ],
)  # fmt: skip
def test_a_wrong_model_is_refused_in_one_line(config, change, message):
    model = reference.Transformer if config is ENCODER_DECODER else reference.GPT
    with pytest.raises(ValueError, match=message) as caught:
        model(config | change, random_weights(config))
    assert "\n" not in str(caught.value)


def test_wrong_inputs_are_refused_in_one_line():
    gpt = reference.GPT(SIZES, random_weights(SIZES))
    framed = reference.GPT(VARIANTS["frames"], random_weights(VARIANTS["frames"]))
    both = reference.Transformer(ENCODER_DECODER, random_weights(ENCODER_DECODER))
    choice = case_of("multiple_choice")[0]
    ids = drawn((2, 4))
    for call, message in (
        (lambda: gpt(ids, np.ones((2, 1, 5))), "frames must be None where the config has no"),
        (lambda: framed(ids, np.ones((2, 1, 4))), "frames must have shape .* got"),
        (lambda: framed(ids, np.ones((2, 13, 5))), "at most n_positions = 16 columns, got 17"),
        (lambda: both(ids, ids[:1]), "must have one B, got 2 and 1"),
        (lambda: both(ids + 23, ids), "encoder's ids must lie in 0 … vocab_size − 1 = 22"),
        (lambda: both(ids, ids[:, 0]), r"decoder's ids must have shape \(B, T\)"),
        (lambda: gpt.task_loss_and_gradients("nli", ids, ids[:, 0], [0, 1]), "task must be one of"),
        (lambda: gpt.task_loss_and_gradients("classification", ids, [3, 3], [0, 1]),
         "must hold score.weight for classification"),
        (lambda: choice.task_loss_and_gradients(
            "multiple_choice", ids[:, None], [[4], [0]], [0, 0]),
         "extract must lie in 0 … T − 1 = 3, got 4"),
        (lambda: choice.task_loss_and_gradients(
            "multiple_choice", ids[:, None], [[3], [0]], [0, 0], np.eye(2, 4)[:, None]),
         "mask must keep a token after the first"),
        (lambda: reference.parameter_shapes({"model_type": "bert"}), "model_type must be one of"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
