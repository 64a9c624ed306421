"""Merged weights answer as the adapter does; the card and the upload say and send what they should."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from luthier.assets import resolve
from luthier.errors import AssetError, RunError
from luthier.events import Progress, Warned
from luthier.export.card import LONGEST, SHOWN, write_card, write_results
from luthier.export.hub import LEFT_OUT, upload
from luthier.export.merge import merged

# PEFT 0.21 asks transformers for a name that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
IDS = torch.tensor([[5, 9, 17, 3]])


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=48, initializer_range=0.3,
        )
    ).eval()  # fmt: skip


def make_tuned():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(make_model(), config).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_merged_equals_adapter_and_leaves_the_model_alone(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "tokenizer.json").write_text("{}")
    tuned = make_tuned()
    before = logits(tuned)
    seen = []
    folder = merged(tuned, tmp_path / "out", tokenizer_from=base, dtype="fp32", sink=seen.append)
    size = sum(p.numel() * 4 for p in make_model().parameters()) / 1e6
    assert any(isinstance(e, Progress) and e.stage == "merge" and e.total == pytest.approx(size) for e in seen)
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.allclose(logits(again), before, atol=1e-5)
    assert not torch.allclose(before, logits(make_model()), atol=1e-2)
    assert torch.equal(logits(tuned), before)
    names = {p.name for p in folder.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "manifest.json"} <= names
    assert not any(name.endswith(".bin") for name in names)
    assert {p.name for p in tmp_path.iterdir()} == {"base", "out"}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "places",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_an_adapter_of_the_head_or_the_table_stays_with_it(places, tied, tmp_path):
    """Where both are one weight, what one has learned is merged into it alone, and the files hold both."""
    from peft import LoraConfig, get_peft_model

    base = make_model()
    if tied:
        base.lm_head.weight, base.config.tie_word_embeddings = base.model.embed_tokens.weight, True
    before = logits(base)
    tuned = get_peft_model(base, LoraConfig(r=4, init_lora_weights=False, **places)).eval()
    with torch.no_grad():
        for weight in tuned.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn_like(weight)
        with tuned.disable_adapter():
            torch.testing.assert_close(logits(tuned), before)
    want = logits(tuned)
    assert not torch.allclose(want, before, atol=1e-2)
    again = AutoModelForCausalLM.from_pretrained(merged(tuned, tmp_path / "out", tokenizer_from=tmp_path))
    torch.testing.assert_close(logits(again), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(tuned), want)  # the model that was given stays as it was
    if places == {"target_modules": ["q_proj", "lm_head"]}:
        assert torch.equal(again.get_input_embeddings().weight, base.get_input_embeddings().weight)


def test_bf16_is_rounded_once(tmp_path):
    tuned = make_tuned()
    want = tuned.merge_and_unload().state_dict()
    folder = merged(make_tuned(), tmp_path / "out", tokenizer_from=tmp_path, dtype="bf16")
    got = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert got.dtype == torch.bfloat16
    assert all(torch.equal(v, want[k].to(torch.bfloat16)) for k, v in got.state_dict().items())


def test_full_models_are_written_too(tmp_path):
    model = make_model()
    again = AutoModelForCausalLM.from_pretrained(merged(model, tmp_path / "out", tokenizer_from=tmp_path))
    assert torch.allclose(logits(again), logits(model), atol=1e-6)


def test_merge_refusals(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(RunError) as foreign:
        merged(make_model(), tmp_path, tokenizer_from=tmp_path)
    assert foreign.value.code == "run-foreign-files"
    quantised = make_model()
    quantised.is_loaded_in_4bit = True
    with pytest.raises(AssetError) as refused:
        merged(quantised, tmp_path / "out", tokenizer_from=tmp_path)
    assert refused.value.code == "asset-unsupported"
    assert not (tmp_path / "out").exists()


def test_card(tmp_path):
    path = write_card(
        tmp_path,
        name="tickets | v2",
        base_model="owner/base",
        config_yaml="prompt:\n  template: '```{x}```'\n",
        scores={"base": {"exact_match": 0.1}, "tuned": {"exact_match": 0.8512}},
        rows=600,
        held_out=60,
        license_name="apache-2.0",
        versions={"torch": "2.13.0"},
    )
    text = path.read_text("utf-8")
    assert text.startswith("---\n")
    assert 'base_model: "owner/base"' in text
    assert "| tuned | 85.1 % |" in text
    assert "````yaml" in text
    assert "# tickets / v2" in text
    from ruamel.yaml import YAML

    front = YAML(typ="safe").load(text.split("---\n")[1])
    assert front["base_model_relation"] == "adapter"
    assert front["license"] == "apache-2.0"


def sample(**texts: str) -> dict[str, str]:
    return {"prompt": "Say it.", "before": "No.", "answer": "It.", "reference": "It."} | texts


def test_the_card_shows_a_few_samples_and_later_results_leave_them(tmp_path):
    hostile = "## Results\n```\n<script>alert(1)</script>\n## Use\n`````\n# big\n~~~"
    samples = [sample(answer=hostile, before=""), sample(prompt="2nd"), sample(prompt="3rd"), sample(prompt="4th")]
    card = {"name": "m", "base_model": "b", "config_yaml": "a: '## Results'\n## Results\n", "samples": samples}
    text = write_card(tmp_path, **card).read_text("utf-8")
    assert f"After:\n\n``````text\n{hostile}\n``````\n\nReference:" in text
    assert "Before:\n\n```text\n(empty)\n```" in text
    assert text.count("### Sample ") == SHOWN and "3rd" in text and "4th" not in text
    shown = text[text.index("## Samples") : text.rindex("## Use")]
    for percent in (0.25, 0.5):
        write_results(tmp_path, {"tuned": {"exact_match": percent}}, 9)
        new = (tmp_path / "README.md").read_text("utf-8")
        assert new.count("| tuned |") == 1 and f"| tuned | {100 * percent:.1f} % |" in new
        assert shown in new and new.index("| tuned |") < new.index(shown)
        assert new[new.index("## Samples") :] == text[text.index("## Samples") :]
    assert "## Samples" not in write_card(tmp_path, **card | {"samples": []}).read_text("utf-8")


def test_samples_are_cut_between_characters_and_hold_no_secrets(tmp_path):
    secret = "a" * (LONGEST - 20) + " sk-abcdefghijklmnopqrstuv me@example.org"
    accent, family = "e\u0301", "\U0001f469\u200d\U0001f469\u200d\U0001f467"
    texts = {
        "prompt": secret,
        "before": "b" * (LONGEST - 1) + accent * 3,
        "answer": "c" * (LONGEST - 2) + family * 2,
        "reference": "d" * LONGEST,
    }
    text = write_card(tmp_path, name="m", base_model="b", config_yaml="", samples=[texts]).read_text("utf-8")
    blocks = text.split("## Samples")[1].split("```text\n")[1:]
    prompt, before, after, reference = (block.split("\n```")[0] for block in blocks)
    assert prompt == "a" * (LONGEST - 20) + " [key] [email]"
    assert before == "b" * (LONGEST - 1) + " …" and after == "c" * (LONGEST - 2) + " …"
    assert reference == texts["reference"]


def test_a_base_that_is_no_hub_id_stays_out_of_the_front_matter(tmp_path):
    text = write_card(tmp_path, name="m", base_model="smollm2", config_yaml="", adapter=None).read_text("utf-8")
    assert "base_model:" not in text
    assert 'library_name: "transformers"' in text


def test_upload(tmp_path, monkeypatch):
    import huggingface_hub

    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    calls = {}

    def create_repo(self, repo_id, **kwargs):
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, **kwargs):
        calls.update(kwargs)
        return SimpleNamespace(pr_url=None, commit_url="address")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    assert upload(tmp_path, "me/model") == "address"
    assert calls["repo_id"] == "me/model"
    assert calls["ignore_patterns"] == list(LEFT_OUT)
    for samples in ([], [sample()]):  # rows of the data are not published unsaid
        write_card(tmp_path, name="m", base_model="b", config_yaml="'## Samples'\n## Samples", samples=samples)
        told = []
        upload(tmp_path, "me/model", sink=told.append)
        assert len([one for one in told if isinstance(one, Warned)]) == len(samples)


def test_what_is_not_as_it_was_written_is_neither_uploaded_nor_taken_as_a_base(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *_, **__: pytest.fail("it was uploaded"))
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    folder = merged(make_tuned(), tmp_path / "out", tokenizer_from=tmp_path / "base")
    assert resolve(str(folder)).path == folder
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(RunError, match=r"model\.safetensors is not as manifest\.json says") as caught:
        upload(folder, "me/model")
    assert caught.value.code == "run-damaged"
    with pytest.raises(AssetError, match=r"model\.safetensors is not as manifest\.json says") as refused:
        resolve(str(folder))
    assert refused.value.code == "asset-damaged" and "delete manifest.json" in str(refused.value)
    (folder / "manifest.json").unlink()
    assert resolve(str(folder)).path == folder
    (folder / "manifest.json").write_text('{"name": "an app"}')  # another program's
    assert resolve(str(folder)).path == folder


def test_upload_refusals(tmp_path, monkeypatch):
    with pytest.raises(RunError) as empty:
        upload(tmp_path, "me/model")
    assert empty.value.code == "run-not-a-run"
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(AssetError) as name:
        upload(tmp_path, "not a name!!")
    assert name.value.code == "asset-upload"
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    def failing(error: Exception) -> str:
        def refuse(self, repo_id, **kwargs):
            raise error

        monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
        with pytest.raises(AssetError) as told:
            upload(tmp_path, "me/model")
        return str(told.value)

    unreachable = failing(HfHubHTTPError.__mro__[1]("no way to the hub"))
    assert "no way to the hub" in unreachable and "hf auth login" in unreachable
    assert "HTTPError" in failing(HfHubHTTPError.__mro__[1](""))
    offline = failing(OfflineModeIsEnabled("offline mode is enabled"))
    assert "unset HF_HUB_OFFLINE" in offline and "hf auth login" not in offline
