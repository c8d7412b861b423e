"""README and docs: every command is valid, every link resolves, both languages say the same."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from rwkv import checkpoint, config
from rwkv.cli import parse

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "README.zh.md", *(ROOT / "docs").rglob("*.md")])
TRANSLATED = [("README.md", "README.zh.md")] + [
    (f"docs/{name}.md", f"docs/zh/{name}.md")
    for name in "guide models recipes export state-tuning preference-tuning evaluation serving data-formats gpus-and-memory faq".split()
]
CONFIGS = {
    "lora": config.LoRAConfig,
    "state": config.StateConfig,
    "dpo": config.DPOConfig,
    "finetune": config.FinetuneConfig,
    "pretrain": config.TrainConfig,
    "convert": config.ConvertConfig,
    "inspect": config.InspectConfig,
    "merge": config.MergeConfig,
    "generate": config.GenerateConfig,
    "serve": config.ServeConfig,
    "evaluate": config.EvaluateConfig,
    "export": config.ExportConfig,
    "estimate": config.EstimateConfig,
    "doctor": config.DoctorConfig,
    "model": config.FetchConfig,
}
SCRIPTS = {"inspect_data": "inspect", "merge_lora": "merge", "fetch": "model"}
TARGETS = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
SERVICES = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]
COMMAND = re.compile(r"^(?:    )?(?:[A-Z_]+=\S+ )?((?:make|python|docker|git|conda) .*)$", re.MULTILINE)
INPUTS = ("load_model", "data_file", "input", "adapter", "model", "lora", "lora_load", "state", "verify", "prompts")


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def read(name: str | Path) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str) -> str:
    """The code of a page: fenced and indented blocks."""
    fenced = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    return fenced + "\n" + "\n".join(re.findall(r"^    \S.*$", text, re.MULTILINE))


def commands(text: str) -> list[list[str]]:
    """The commands of a page's code as lists of words."""
    return [shlex.split(line, comments=True) for line in COMMAND.findall(blocks(text))]


def job(words: list[str]) -> tuple[str, list[str]] | None:
    """The job of a command and its flags, or None if it starts no job. Fails on unknown targets and
    services.
    """
    if words[0] == "make":
        variables = dict(word.split("=", 1) for word in words[1:] if "=" in word)
        targets = [word for word in words[1:] if "=" not in word]
        assert set(targets) <= TARGETS, words
        assert set(variables) <= {"ARGS", "STACK", "PY", *(["MODEL"] if targets == ["model"] else [])}, words
        assert variables.get("STACK", "modern") in ("cu117", "modern")
        if targets == ["model"]:
            chosen = ["--model", variables["MODEL"]] if "MODEL" in variables else []
            return "model", [*chosen, *shlex.split(variables.get("ARGS", ""))]
        return (targets[0], shlex.split(variables["ARGS"])) if "ARGS" in variables else None
    if words[0] == "python":
        path = Path(words[1])
        assert (ROOT / path).is_file(), words
        return SCRIPTS.get(path.stem, path.stem), words[2:]
    if words[:2] == ["docker", "compose"] and words[2] == "run":
        assert words[3] == "--rm"
        words = [word for word in words if word != "--service-ports"]
        assert words[4] in SERVICES, words
        return (words[4], words[5:]) if len(words) > 5 else None
    assert words[0] in ("git", "docker", "cd", "conda"), words
    return None


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_parse_and_their_files_exist(page):
    existing = {"out/demo/base/rwkv-0.pth", "out/demo/lora/rwkv-0.pth", "out/demo/tuned.pth"}  # created by the demo
    assert all(f"{path.removeprefix('out/demo/')}" in read("scripts/demo.sh") for path in existing)
    for words in commands(page.read_text(encoding="utf-8")):
        name, flags = job(words) or ("", [])
        if name not in CONFIGS:  # bench and test have other parsers
            continue
        values = vars(parse(CONFIGS[name], "", flags))
        for flag in INPUTS:
            path = values.get(flag)
            # --lora true, --model 7b
            if not isinstance(path, str) or (name, flag) in (("estimate", "model"), ("model", "model")):
                continue
            for part in filter(None, path.split(",")):
                part = part.rpartition("=")[2]  # serve: NAME=FILE
                assert part in existing or list(ROOT.glob(part)), (
                    f"{part}: created by no earlier command of {page_id(page)}"
                )
        if name == "convert" and values["output_prefix"]:
            existing.add(f"{values['output_prefix']}_text_document")
        if name in ("lora", "state", "dpo", "finetune", "pretrain"):
            existing.add(f"{values['proj_dir']}/rwkv-{values['epoch_count'] - 1}.pth")
        if name == "model" and values["model"]:
            existing.add(f"models/{values['model']}.pth")
        if name in ("merge", "export", "generate") and values["output"]:
            existing.add(values["output"])


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_inline_targets_and_flags_exist(page):
    text = page.read_text(encoding="utf-8")
    code = " ".join(re.findall(r"`([^`\n]+)`", text))
    assert set(re.findall(r"\bmake ([a-z][a-z-]+)", code)) <= TARGETS | {"help"}
    fields = {name for kind in CONFIGS.values() for name in kind.__dataclass_fields__}
    others = {"help", "gpus", "ipc", "shm-size", "rm"}  # flags of launch.sh and docker
    others |= set(re.findall(r"--([\w-]+)", " ".join(read(p) for p in (ROOT / "bench").glob("*.py"))))
    for flag in re.findall(r"--([a-z][\w-]+)", code):
        assert flag.replace("-", "_") in fields or flag in others, flag


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_and_images_resolve(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def anchors(page):
    """Of the headings of a page, as GitHub and its Markdown viewers name them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_to_headings_resolve(page):
    for target, anchor in re.findall(r"\]\(([^)#]*)#([^)]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            assert anchor in anchors(page.parent / target if target else page), (target, anchor)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_files_named_in_text_exist(page):
    for path in re.findall(
        r"`((?:scripts|rwkv|bench|data|tests|cuda|docs)/[\w./-]+)`", page.read_text(encoding="utf-8")
    ):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_readme_is_short(name):
    assert len(read(name).splitlines()) <= 130


@pytest.mark.parametrize(("english", "chinese"), TRANSLATED)
def test_translations_match(english, chinese):
    ours, theirs = read(english), read(chinese)
    assert len(re.findall(r"^#+ ", ours, re.MULTILINE)) == len(re.findall(r"^#+ ", theirs, re.MULTILINE))
    assert commands(ours) == commands(theirs)
    targets = [set(re.findall(r"`make\s([a-z-]+)`", text)) for text in (ours, theirs)]
    assert targets[0] == targets[1]


@pytest.mark.parametrize("page", ["docs/faq.md", "docs/zh/faq.md"])
def test_faq_quotes_real_messages(page):
    foreign = {
        "could not select device driver",
        "ModuleNotFoundError: No module named 'rwkv'",
        "make venv",
        "--load_model",
        "not an RWKV-4 checkpoint",  # its number is that of a version
    }
    folders = [*(ROOT / "rwkv").rglob("*.py"), *(ROOT / "env").glob("*.sh"), *(ROOT / "docker").glob("*.sh")]
    source = " ".join(path.read_text(encoding="utf-8") for path in folders)
    heads = re.findall(r"^### .*$|^\| `[^`]+` \|", read(page), re.MULTILINE)
    quoted = [part for head in heads for code in re.findall(r"`([^`]+)`", head) for part in code.split("…")]
    for part in (part.strip() for part in quoted):
        assert part in source or any(part.startswith(known) for known in foreign), part


# commands that other tests run, as they need a network, a cluster, several processes or a browser
ELSEWHERE = {
    "model": "tests/hub",
    "ray": "tests/data/convert/test_ray_pool.py",
    "serve": "tests/serve",
    "--tasks": "tests/evaluation",
    "--ray": "tests/data/convert/test_ray_pool.py",
    "--devices": "tests/train/test_strategies.py",
}
PRINTED = {  # by page and job
    ("preference-tuning.md", "inspect"): "pairs:      16, with answers of",
    ("preference-tuning.md", "dpo"): "done:  loss 0.693 (first step)",
}
RUN = [page for page in PAGES if "zh" not in page_id(page) and "decisions" not in page.parts and page.stem != "results"]


def shortened(name: str, flags: list[str]) -> list[str]:
    """The flags of a job with four generated tokens, or two training steps on the CPU (DPO, whose
    metrics are checked: all steps).
    """
    changed = {}
    if name in ("lora", "state", "dpo", "finetune", "pretrain"):
        changed = {"--accelerator": "cpu", "--precision": "fp32"} | ({"--epoch_steps": "2"} if name != "dpo" else {})
    if name == "generate":
        changed = {"--max_tokens": "4"}
    for flag, value in changed.items():
        if flag in flags:
            flags = [*flags[: flags.index(flag)], *flags[flags.index(flag) + 2 :]]
        flags = [*flags, flag, value]
    return flags


@pytest.mark.parametrize("page", RUN, ids=page_id)
def test_commands_run(page, script, make_model, tmp_path):
    """In the order of the page, shortened, with small models instead of the demo's and the
    published ones.
    """
    for name in ("data", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    model = make_model(version="7", vocab_size=65536, n_embd=64, head_size=64)
    for name in ("out/demo/base/rwkv-0.pth", "out/demo/tuned.pth", "models/rwkv7-g1-0.4b.pth"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save_model(tmp_path / name, model, {})
    adapter = "--load_model out/demo/base/rwkv-0.pth --data_file data/example.jsonl --ctx_len 64 --micro_bsz 2"
    adapter += " --proj_dir out/demo/lora --epoch_count 1"
    if "out/demo/lora" in page.read_text(encoding="utf-8"):
        script("lora.py", *shortened("lora", adapter.split()))
    for words in commands(page.read_text(encoding="utf-8")):
        name, flags = job(words) or (words[1], [])
        if name not in CONFIGS or {name, *flags} & ELSEWHERE.keys():
            continue
        path = next((key for key, value in SCRIPTS.items() if value == name), name) + ".py"
        printed = script(path, *shortened(name, flags)).stdout
        assert PRINTED.get((page.name, name), "") in printed
    if page.name == "guide.md":
        assert (tmp_path / "out/example_text_mask.bin").stat().st_size > 0
    if page.name == "preference-tuning.md":
        lines = (tmp_path / "out/dpo/metrics.jsonl").read_text(encoding="utf-8").splitlines()
        assert json.loads(lines[-1])["reward_margin"] > json.loads(lines[0])["reward_margin"]
