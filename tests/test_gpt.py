"""Both models against transformers, the cache against none, and directories there and back."""

import copy
import json

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from gaugeblock.gpt import GPT, GPTConfig, KVCache
from gaugeblock.gpt.config import PRESETS
from gaugeblock.gpt.generate import sample
from gaugeblock.gpt.tokenizer import ByteTokenizer, load_tokenizer
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
)

from gaugeblock import kernels, reference
from tests.helpers import gaugeblock

SHAPES = {
    "plain": {},
    "erf": {"activation_function": "gelu"},
    "relu": {"activation_function": "relu"},
    "untied": {"tie_word_embeddings": False},
    "unscaled": {"scale_attn_weights": False},
    "scaled_by_layer": {"scale_attn_by_inverse_layer_idx": True},
    "narrow_ffn": {"n_inner": 20},
    "eps": {"layer_norm_epsilon": 0.1},
    "gpt1": {"model_type": "openai-gpt"},
    "gpt1_untied": {"model_type": "openai-gpt", "tie_word_embeddings": False, "afn": "relu"},
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = dict(n_layer=3, n_head=2, n_embd=16, n_positions=24, vocab_size=41)
KINDS = {
    "gpt2": (GPT2Config, GPT2LMHeadModel),
    "openai-gpt": (OpenAIGPTConfig, OpenAIGPTLMHeadModel),
}


def peer(scale=0.2, seed=0, **options):
    """A GPT of transformers in float64 with every parameter random."""
    config, model = KINDS[options.pop("model_type", "gpt2")]
    # no special tokens: the usual ones lie outside so small a vocabulary
    config = config(**{**SIZES, **options}, bos_token_id=None, eos_token_id=None)
    model = model(config).double().eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=draw, dtype=p.dtype) * scale)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = peer()
    directory = tmp_path_factory.mktemp("peer")
    model.save_pretrained(directory)
    return model, directory


def ours(directory, dtype="float64", impl="eager"):
    return GPT.from_pretrained(directory, dtype, impl)


def tokens(batch, time, seed=0, vocab_size=SIZES["vocab_size"]):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, vocab_size, (batch, time)))


def close(mine, theirs):
    theirs = torch.as_tensor(theirs).detach().numpy()
    scale = np.abs(theirs).max()
    np.testing.assert_allclose(np.asarray(mine), theirs, rtol=1e-10, atol=1e-10 * scale)


def named_gradients(model):
    return plain({n: p.grad.numpy() for n, p in model.named_parameters()})


def plain(named):
    """By the names that both kinds of GPT have in our model."""
    tables = {"tokens_embed.weight": "wte.weight", "positions_embed.weight": "wpe.weight"}
    named = {n.removeprefix("transformer."): x for n, x in named.items()}
    return {tables.get(n, n): x for n, x in named.items()}


@pytest.mark.parametrize("scale", [0.02, 0.2])
@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
def test_both_models_agree_with_transformers(options, scale, tmp_path):
    theirs = peer(scale, **options)
    theirs.save_pretrained(tmp_path)
    idx, targets = tokens(2, 13), tokens(2, 13, seed=1)
    logits = theirs(idx).logits
    # transformers' own loss is computed in float32
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    their_gradients = named_gradients(theirs)

    model = ours(tmp_path)
    our_logits, our_loss = model(idx, targets)
    our_loss.backward()
    close(our_logits.detach(), logits)
    close(our_loss.detach(), loss)

    truth = reference.GPT.from_pretrained(tmp_path)
    close(truth(idx.numpy()), logits)
    true_loss, true_gradients = truth.loss_and_gradients(idx.numpy(), targets.numpy())
    close(true_loss, loss)

    true_gradients = plain(true_gradients)
    assert set(true_gradients) == set(their_gradients) == set(named_gradients(model))
    for name, gradient in their_gradients.items():
        close(true_gradients[name], gradient)
        close(named_gradients(model)[name], gradient)


@pytest.mark.parametrize("kind", KINDS)
def test_a_directory_goes_there_and_back(kind, tmp_path):
    theirs = peer(model_type=kind)
    theirs.save_pretrained(tmp_path / "theirs")
    ours(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    back = KINDS[kind][1].from_pretrained(tmp_path / "ours", dtype=torch.float64)
    idx = tokens(2, 9)
    close(back(idx).logits.detach(), theirs(idx).logits)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    assert {p.name for p in (tmp_path / "ours").iterdir()} == {"config.json", "model.safetensors"}
    assert {p.name for p in tmp_path.iterdir()} == {"ours", "theirs"}


WINDOWS = {
    "gpt3": {"attention_windows": (None, 3, 5)},
    "gpt1": {"model_type": "openai-gpt"},
}


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("options", WINDOWS.values(), ids=WINDOWS)
def test_banded_and_post_ln_layers_agree_with_the_reference(options, impl, tmp_path):
    torch.manual_seed(1)
    config = GPTConfig(n_layer=3, n_head=2, n_embd=16, block_size=24, vocab_size=41, **options)
    model = GPT(config, impl).double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    model.save_pretrained(tmp_path)
    truth = reference.GPT.from_pretrained(tmp_path)
    again = ours(tmp_path, impl=impl)
    assert again.config.to_dict().items() >= config.to_dict().items()
    # compiled and interpreted kernels take their scale and eps in float32
    tolerance = dict(rtol=1e-5, atol=1e-6) if impl == "triton" else dict(rtol=1e-10, atol=1e-10)
    idx, targets = tokens(2, 13), tokens(2, 13, seed=1)
    again = again.to(DEVICE) if impl == "triton" else again
    logits, loss = again(idx.to(again.wte.weight.device), targets.to(again.wte.weight.device))
    loss.backward()
    want, gradients = truth.loss_and_gradients(idx.numpy(), targets.numpy())
    np.testing.assert_allclose(logits.detach().cpu(), truth(idx.numpy()), **tolerance)
    np.testing.assert_allclose(loss.detach().cpu(), want, **tolerance)
    for name, g in plain(gradients).items():
        mine = again.get_parameter(name).grad.cpu()
        np.testing.assert_allclose(mine, g, **tolerance, err_msg=name)


@pytest.mark.parametrize("options", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("prompt", [5, 18], ids=["decoded", "prefilled"])
def test_a_cache_keeps_bands_and_post_ln(options, prompt):
    torch.manual_seed(2)
    config = GPTConfig(n_layer=3, n_head=2, n_embd=16, block_size=24, vocab_size=41, **options)
    model = GPT(config, "eager").double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    idx = tokens(2, 24)
    want, _ = model(idx)
    cache = KVCache(model, 2)
    parts = [model(idx[:, :prompt], cache=cache)[0]]
    parts += [model(idx[:, t : t + 1], cache=cache)[0] for t in range(prompt, 24)]
    close(torch.cat(parts, 1).detach(), want)


# parameters of the published shapes, with the head tied
PRESET_COUNTS = {
    "gpt1": 116_534_784,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "gpt3-125m": 125_226_240,
    "gpt3-350m": 355_871_744,
    "gpt3-760m": 760_300_032,
    "gpt3-1.3b": 1_315_723_264,
    "gpt3-2.7b": 2_651_553_280,
    "gpt3-6.7b": 6_658_404_352,
    "gpt3-13b": 12_853_386_240,
    "gpt3-175b": 174_604_259_328,
}


def test_presets_have_their_parameters():
    counted = {name: reference.parameter_count(config) for name, config in PRESETS.items()}
    assert counted == PRESET_COUNTS
    for name in ("gpt1", "gpt2", "gpt3-125m", "gpt3-175b"):
        with torch.device("meta"):
            model = GPT(GPTConfig.preset(name))
        assert model.parameter_count() == PRESET_COUNTS[name]
        # the reference's truth about names and shapes is the model's
        wanted = plain(reference.parameter_shapes(model.config))
        assert {k: tuple(p.shape) for k, p in model.named_parameters()} == wanted
    windows = GPTConfig.preset("gpt3-125m").attention_windows
    assert windows == (None, 256) * 6
    with pytest.raises(ValueError, match=r"name must be one of gpt1, .*, got 'gpt4'"):
        GPTConfig.preset("gpt4")


@pytest.mark.parametrize("name", ["n_inner", "scale_attn_weights", "activation"])
def test_what_gpt1_cannot_say_is_refused(name):
    value = {"n_inner": 5, "scale_attn_weights": False, "activation": "gelu"}[name]
    with pytest.raises(ValueError, match=f"{name} must be .* for openai-gpt, got"):
        GPTConfig(model_type="openai-gpt", **{name: value})


def test_keys_without_the_prefix_load_too(saved, tmp_path):
    from safetensors.numpy import load_file, save_file

    theirs, directory = saved
    weights = load_file(directory / "model.safetensors")
    plain = {k.removeprefix("transformer."): v for k, v in weights.items()}
    assert plain.keys() != weights.keys()
    # what old files hold beside the parameters
    plain["h.0.attn.bias"] = np.tril(np.ones((1, 1, 24, 24), np.float32))
    plain["lm_head.weight"] = plain["wte.weight"]
    save_file(plain, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    idx = tokens(1, 7)
    want = theirs(idx).logits.detach()
    close(ours(tmp_path)(idx)[0].detach(), want)
    close(reference.GPT.from_pretrained(tmp_path)(idx.numpy()), want)


def test_dtype_and_foreign_keys_are_kept(saved, tmp_path):
    _, directory = saved
    model = GPT.from_pretrained(directory, dtype="bfloat16")
    assert model.wte.weight.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    before = json.loads((directory / "config.json").read_text())
    assert config.items() >= (before | {"dtype": "bfloat16"}).items()
    again = GPT.from_pretrained(tmp_path)
    assert again.wte.weight.dtype == torch.bfloat16
    assert torch.equal(again.wte.weight, model.wte.weight)


def test_generation_with_and_without_a_cache_is_the_same(saved):
    theirs, directory = saved
    model = ours(directory)
    idx = tokens(3, 5)
    cached = model.generate(idx, 19, temperature=0)
    assert torch.equal(cached, model.generate(idx, 19, temperature=0, use_cache=False))
    theirs = theirs.generate(
        idx, attention_mask=torch.ones_like(idx), max_new_tokens=19, do_sample=False, pad_token_id=0
    )
    assert torch.equal(cached, theirs)
    assert len(set(cached[0, 5:].tolist())) > 1
    drawn = [
        model.generate(idx, 19, seed=s, use_cache=c) for s, c in ((1, True), (1, False), (2, True))
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_past_the_context_is_an_error_or_slides(saved):
    model = ours(saved[1])
    with pytest.raises(ValueError, match="must fit block_size = 24, got 5 \\+ 20"):
        model.generate(tokens(1, 5), 20)
    with pytest.raises(ValueError, match="stay within block_size = 24 tokens, got 25"):
        model(tokens(1, 25))
    long = [model.generate(tokens(1, 30), 40, 0, slide=True, use_cache=c) for c in (True, False)]
    assert long[0].shape == (1, 70)
    assert torch.equal(*long)


def test_past_the_context_it_goes_on_from_the_last_half(saved, monkeypatch):
    model, seen = ours(saved[1]), []
    forward = GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda *a, **k: seen.append(a[1]) or forward(*a, **k))
    said = model.generate(tokens(1, 30), 14, 0, slide=True, use_cache=False)
    # all of the context, then half of it and what is new
    lengths = [24, *range(13, 25), 13]
    for i, (idx, length) in enumerate(zip(seen, lengths, strict=True)):
        assert torch.equal(idx, said[:, 30 + i - length : 30 + i])


def test_each_token_has_a_draw_of_its_own_and_the_filters(saved, monkeypatch):
    model, idx, seen = ours(saved[1]), tokens(2, 3), []
    greedy = model.generate(idx, 9, 0)
    for options in (dict(top_k=1), dict(top_p=1e-6), dict(temperature=1e-3)):
        assert torch.equal(model.generate(idx, 9, seed=1, **options), greedy)
    op = kernels.sample
    monkeypatch.setattr(
        kernels, "sample", lambda x, u, *a, **k: seen.append(u) or op(x, u, *a, **k)
    )
    model.generate(idx, 9, seed=1)
    assert len(torch.cat(seen).unique()) == 18


@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_padding_changes_nothing(saved, side):
    theirs, directory = saved
    model = ours(directory)
    idx, targets = tokens(3, 10), tokens(3, 10, seed=2)
    mask = torch.ones_like(idx)
    for row, pads in enumerate((0, 3, 7)):
        mask[
            row,
            {"left": slice(0, pads), "right": slice(10 - pads, 10), "holes": slice(1, pads)}[side],
        ] = 0
    logits, loss = model(idx, targets, attention_mask=mask)
    losses = []
    for row in range(3):
        keep = mask[row] == 1
        alone = theirs(idx[row : row + 1, keep]).logits[0]
        close(logits[row, keep].detach(), alone)
        losses.append(
            torch.nn.functional.cross_entropy(alone, targets[row, keep], reduction="none")
        )
    close(loss.detach(), torch.cat(losses).mean())
    assert (logits[mask == 0] == 0).all()


def test_positions_follow_the_mask_as_in_transformers(saved):
    theirs, directory = saved
    idx, mask = tokens(2, 8), torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    want = theirs(idx, attention_mask=mask, position_ids=positions).logits
    got, _ = ours(directory)(idx, attention_mask=mask)
    close(got[mask == 1].detach(), want[mask == 1])


def test_the_triton_model_equals_the_eager_one(saved):
    idx, targets = tokens(2, 11), tokens(2, 11, seed=3)
    answers = []
    for impl in ("triton", "eager"):
        model = ours(saved[1], impl=impl).to(DEVICE)
        logits, loss = model(idx.to(DEVICE), targets.to(DEVICE))
        loss.backward()
        answers.append([logits, loss, *(p.grad for p in model.parameters())])
    for triton, eager in zip(*answers):
        # compiled kernels take their scale and eps in float32
        torch.testing.assert_close(triton, eager, rtol=1e-6, atol=1e-7)


def test_sampling_options():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))

    def support(**options):
        draw = torch.Generator().manual_seed(0)
        many = logits.expand(300, 4)
        return set(sample(many, generator=draw, impl="eager", **options).tolist())

    assert support() == {0, 1, 2, 3}
    assert support(top_k=2) == {0, 1}
    assert support(top_p=0.75) == {0, 1}
    assert support(top_p=0.81) == {0, 1, 2}
    assert support(top_p=0.01) == {0}
    assert support(temperature=0) == {0}
    assert support(temperature=0.01) == {0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(temperature=-1), "temperature must be 0 or lie in 0.001 … 1000, got -1"),
        (dict(top_k=0), "top_k must be ≥ 1, got 0"),
        (dict(top_p=1.5), "top_p must lie in 0 … 1, got 1.5"),
    ],
)
def test_sampling_options_out_of_range(saved, options, message):
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(saved[1]).generate(tokens(1, 3), 2, **options)


def test_wrong_ids_are_refused(saved):
    model = GPT.from_pretrained(saved[1])
    truth = reference.GPT.from_pretrained(saved[1])
    for bad, kind, message in (
        (tokens(1, 3) + 41, ValueError, "must lie in 0 … vocab_size − 1 = 40"),
        (tokens(1, 3) - 41, ValueError, "must lie in 0 … vocab_size − 1 = 40"),
        (tokens(1, 3).float(), TypeError, "must be integers"),
        (tokens(1, 3)[0], ValueError, r"must have shape \(B, T\)"),
    ):
        with pytest.raises(kind, match=message):
            model(bad)
        with pytest.raises(kind, match=message):
            truth(bad.numpy())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layers": 2}, "every key must be one of GPT's, got 'n_layers'"),
        ({"activation_function": "silu"}, "activation_function must be one of"),
        ({"model_type": "llama"}, "model_type must be one of gpt2, openai-gpt, got 'llama'"),
        ({"add_cross_attention": True}, "add_cross_attention must be False, got True"),
        ({"layer_norm_epsilon": "x"}, "eps must be a number ≥ 0, got 'x'"),
        (
            {"attention_windows": [2]},
            "attention_windows must be a list of n_layer = 3 entries, got",
        ),
        ({"attention_windows": [2, 0, 2]}, "must hold None or whole numbers ≥ 1, got 0"),
        ({"model_type": "openai-gpt"}, "every key must be one of GPT's, got 'activation_function'"),
        ({"n_inner": -4}, "n_inner must be a whole number ≥ 1, got -4"),
        ({"n_head": 3}, "n_head must divide n_embd = 16, got 3"),
        ({"n_layer": None}, "n_layer must be a whole number ≥ 1, got None"),
        ({"n_embd": 32}, r"must have shape \(96,\), got \(48,\)"),
        ({"n_layer": 4}, "must hold 'h.3.ln_1.weight', it does not"),
        ({"n_layer": 2}, "must hold GPT's keys only, got 'h.2"),
    ],
)
def test_a_wrong_directory_is_refused(saved, tmp_path, change, message):
    _, directory = saved
    config = json.loads((directory / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((directory / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=message) as caught:
        GPT.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", [GPT, reference.GPT])
def test_a_directory_without_weights_is_refused(saved, tmp_path, model):
    with pytest.raises(FileNotFoundError, match=r"must hold config\.json"):
        model.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((saved[1] / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match=r"must hold model\.safetensors"):
        model.from_pretrained(tmp_path)


def test_a_prompt_that_is_no_text_is_refused_in_one_line(saved, tmp_path):
    ours(saved[1]).save_pretrained(tmp_path)
    ByteTokenizer().save(tmp_path)
    ran = gaugeblock(
        "generate", "--model", tmp_path, "--prompt", b"a\xff".decode(errors="surrogateescape")
    )
    assert ran.returncode == 2, ran.stderr
    assert (
        ran.stderr == "gaugeblock: tokenizer: text must be UTF-8, character 1 is not; convert it\n"
    )


def test_broken_files_are_refused_in_one_line(saved, tmp_path):
    for name in ("config.json", "model.safetensors"):
        content = (saved[1] / name).read_bytes()
        (tmp_path / name).write_bytes(content)
    ByteTokenizer().save(tmp_path)
    for name, content, message in (
        ("tokenizer.json", b"{", "tokenizer.json: must be whole"),
        ("model.safetensors", b"\x00\x01", "model.safetensors: must be whole"),
        ("config.json", b"{", "config.json: must be JSON"),
        ("config.json", b"3", "config.json: must hold an object, got int"),
    ):
        (tmp_path / name).write_bytes(content)
        ran = gaugeblock("generate", "--model", tmp_path, "--prompt", "a")
        assert ran.returncode == 2, ran.stderr
        assert message in ran.stderr
        assert ran.stderr.count("\n") == 1


def test_keys_that_change_nothing_are_ignored(saved, tmp_path):
    config = json.loads((saved[1] / "config.json").read_text())
    config |= {"gradient_checkpointing": False, "is_decoder": False, "do_sample": True, "n_ctx": 24}
    assert GPTConfig.from_dict(config).to_dict().items() >= config.items()


def test_the_reference_reads_bfloat16_and_names_what_is_missing(saved, tmp_path):
    GPT.from_pretrained(saved[1], dtype="bfloat16").save_pretrained(tmp_path)
    truth = reference.GPT.from_pretrained(tmp_path)
    want = GPT.from_pretrained(tmp_path, dtype="float64", impl="eager")(tokens(1, 5))[0]
    close(truth(tokens(1, 5).numpy()), want)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"n_layer": None}, "n_layer must be a whole number ≥ 1, got None"),
        ({"n_head": 3}, "n_head must divide n_embd = 16, got 3"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            reference.GPT.from_pretrained(tmp_path)


def test_a_cache_takes_no_mask(saved):
    model = ours(saved[1])
    idx = tokens(1, 4)
    with pytest.raises(ValueError, match="attention_mask must be None with a cache"):
        model(idx, attention_mask=torch.ones_like(idx), cache=KVCache(model, 1))


def test_a_save_onto_a_file_is_refused(saved, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="must be a folder to save to"):
        ours(saved[1]).save_pretrained(tmp_path / "file")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_config_needs_its_sizes():
    with pytest.raises(ValueError, match="n_layer must be set"):
        GPTConfig.from_dict({"n_head": 1})
    with pytest.raises(ValueError, match="n_embd must be a whole number ≥ 1, got 0"):
        GPTConfig(n_embd=0)
    with pytest.raises(ValueError, match="activation must be one of"):
        GPTConfig(activation="swish")


def test_a_failed_save_leaves_nothing(saved, tmp_path, monkeypatch):
    model = copy.deepcopy(GPT.from_pretrained(saved[1]))
    monkeypatch.setattr("gaugeblock.gpt.model.save_file", lambda *a, **o: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_bytes_are_tokens_here_and_in_transformers(tmp_path):
    text = "Ein Satz mit Ümläut,\n\tund 日本 🙂 \x00\x7f"
    tokenizer = ByteTokenizer()
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(GPTConfig(vocab_size=256).to_dict()))
    ids = list(text.encode())
    assert tokenizer.encode(text).tolist() == ids
    assert tokenizer.decode(ids) == text
    for theirs in (load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert list(theirs.encode(text)) == ids
        assert theirs.decode(ids) == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "nowhere", "--prompt", "a"), "nowhere must hold config.json"),
        (("--model", ".", "--prompt", "a"), "must hold config.json"),
        (("--prompt", "a"), "--model"),
    ],
)
def test_generate_refuses_what_it_cannot_read(tmp_path, arguments, message):
    ran = gaugeblock("generate", *arguments, cwd=tmp_path)
    assert ran.returncode == 2
    assert message in ran.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": False}], ids=["tied", "untied"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_fused_loss_is_the_loss(options, padded, tmp_path):
    peer(**options).save_pretrained(tmp_path)
    idx, targets = tokens(2, 13), tokens(2, 13, seed=1)
    mask = torch.ones_like(idx)
    if padded:
        mask[0, :4] = 0
        mask[1, 9:] = 0
    found = []
    for fused in (False, True):
        model = ours(tmp_path)
        logits, loss = model(idx, targets, mask, fused_loss=fused)
        assert (logits is None) == fused
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for plain, fused in zip(*found):
        close(fused, plain)


def test_a_fused_loss_needs_targets(saved):
    with pytest.raises(ValueError, match="GPT: fused_loss must have targets, got None"):
        ours(saved[1])(tokens(1, 5), fused_loss=True)


def test_dropout_is_for_training_and_follows_its_seed(saved):
    model, idx = ours(saved[1], "float32"), tokens(2, 13)
    whole = model(idx)[0]
    model.dropout = 0.3
    assert torch.equal(model.eval()(idx)[0], whole)
    model.train()
    drawn = []
    for model.dropout_seed in (1, 2, 1):
        drawn.append(model(idx)[0])
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], whole)


def test_each_place_that_drops_has_a_seed_of_its_own(saved, monkeypatch):
    seeds = []
    for name, at in (("dropout", 2), ("attention", None)):
        op = getattr(kernels, name)

        def spied(*args, op=op, at=at, **options):
            seeds.append(options["seed"] if at is None else args[at])
            assert (options["dropout"] if at is None else args[1]) == 0.1
            return op(*args, **options)

        monkeypatch.setattr(kernels, name, spied)
    model = ours(saved[1])
    model.dropout = 0.1
    for step in (0, 1):
        model(tokens(1, 3), dropout_seed=step)
    # embedding; attention and two projections of each layer
    assert len(seeds) == len(set(seeds)) == 2 * (1 + 3 * SIZES["n_layer"])


def test_generation_drops_nothing_and_leaves_the_mode_as_it_was(saved):
    model, idx = ours(saved[1], "float32"), tokens(2, 5)
    want = model.generate(idx, 12, 0)
    model.dropout = 0.5
    for training in (True, False):
        model.train(training)
        for use_cache in (True, False):
            assert torch.equal(model.generate(idx, 12, 0, use_cache=use_cache), want)
            assert model.training == training == model.h[0].training

    def fails(*_):
        raise IndexError("a fault")

    model.train().register_forward_hook(fails)
    with pytest.raises(IndexError, match="a fault"):
        model.generate(idx, 1)
    assert model.training


def test_what_is_cached_has_no_gradient(saved):
    model = ours(saved[1])
    cache = KVCache(model, 2)
    for count in (18, 3, 1):
        # outside of no_grad, a graph would grow with every token
        model(tokens(2, count), cache=cache)
    assert not cache.k.requires_grad and not cache.v.requires_grad
    with pytest.raises(ValueError, match="cache must be for idx's rows, 3, got one for 2"):
        model(tokens(3, 1), cache=cache)
    assert cache.length == 22


def test_generation_needs_rows(saved):
    with pytest.raises(ValueError, match=r"generate: idx must have shape \(B, T\), got \(5,\)"):
        ours(saved[1]).generate(tokens(1, 5)[0], 2)


def test_a_compiled_model_is_not_compiled_anew_for_each_dropout_seed(saved):
    model, idx, targets = ours(saved[1], "float32"), tokens(2, 13), tokens(2, 13, seed=1)
    model.dropout = 0.3
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    losses = []
    for model.dropout_seed in range(2**40, 2**40 + 4):
        losses.append(model(idx, targets)[1])
    model.dropout_seed = 0
    for seed, loss in zip(range(2**40, 2**40 + 4), losses):
        assert torch.equal(model(idx, targets, dropout_seed=seed)[1], loss)
        assert torch.equal(compiled(idx, targets, dropout_seed=seed)[1], loss)
    assert len(set(losses)) == 4
    # the first seed as a constant, all others as a symbol
    assert counter.frame_count <= 2


@pytest.mark.parametrize("impl", ["triton", "eager"])
def test_autocast_and_names_choose_the_dtype_of_activations(saved, impl):
    idx, targets = tokens(2, 7).to(DEVICE), tokens(2, 7, seed=1).to(DEVICE)
    model = ours(saved[1], "float32", impl).to(DEVICE)
    for model.compute_dtype in ("bfloat16", torch.bfloat16):
        want, loss = model(idx, targets)
        assert want.dtype == torch.bfloat16 and loss.dtype == torch.float32
    said = model.generate(idx, 3, 0)
    model.compute_dtype = None
    with torch.autocast(DEVICE, torch.bfloat16):
        got, loss = model(idx, targets)
        again = model.generate(idx, 3, 0)
    assert got.dtype == torch.bfloat16
    # plain torch multiplies in the narrow dtype there, the kernels do not
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05 * want.abs().max().item())
    if impl == "triton":
        assert torch.equal(got, want) and torch.equal(again, said)
    loss.backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_all_kernels_drop_the_same_as_their_twins(saved):
    idx, targets = tokens(2, 13), tokens(2, 13, seed=1)
    found = []
    for impl in ("eager", "triton"):
        model = ours(saved[1], "float32", impl).to(DEVICE)
        model.dropout, model.dropout_seed = 0.2, 5
        _, loss = model(idx.to(DEVICE), targets.to(DEVICE), fused_loss=True)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for eager, triton in zip(*found):
        torch.testing.assert_close(triton, eager, rtol=1e-4, atol=1e-5)


def test_decoding_reads_the_cache_by_pages(saved, monkeypatch):
    calls = []
    paged = kernels.paged_attention
    monkeypatch.setattr(
        kernels, "paged_attention", lambda q, *a, **k: calls.append(q.shape[2]) or paged(q, *a, **k)
    )
    model = ours(saved[1])
    model.generate(tokens(2, 18), 3, temperature=0)
    # the prompt is longer than what is decoded together
    assert calls == [1] * 2 * SIZES["n_layer"]
