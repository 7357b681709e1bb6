"""The scripts of benchmarks/speed at tiny sizes: they run, find the same results, and end as they promise."""

import importlib
import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks" / "speed"
FEWER = {"step": ["--methods", "ua_mt,mcf"]}
RATIOS = {"metrics": 60, "inference": 1.6, "step": 3, "loading": 15, "distance": 5, "memory": 2}  # targets


@pytest.fixture
def script(monkeypatch):
    """script(name) -> the module of a script, without data of this machine in its reach."""
    monkeypatch.syspath_prepend(str(FOLDER))  # by its own name: processes that it spawns import it, too
    monkeypatch.delenv("SSL4MIS_DATA", raising=False)
    monkeypatch.chdir(FOLDER)  # where no folder `data` is
    return importlib.import_module


def last_line(text):
    return json.loads(text.strip().splitlines()[-1])


# --- each subject ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RATIOS)
def test_quick_runs_and_ends_as_promised(script, capsys, name):
    assert script(name).main(["--quick", *FEWER.get(name, ())]) == 0
    text = capsys.readouterr().out
    figures = last_line(text)
    assert figures["subject"] == name and figures["exact"] is True
    assert figures["targets"]["ratio"] == RATIOS[name]
    assert all(figures[key] > 0 for key in figures["targets"])
    assert all(0 <= figures[key] <= 100 for key in figures["limits"])
    assert "| --- |" in text


@pytest.mark.parametrize("name", [*RATIOS, "all", "gpu"])
def test_a_folder_without_data_is_one_line(script, capsys, tmp_path, name):
    words = ["--device", "cpu"] if name == "gpu" else []
    assert script(name).main(["--quick", "--data", str(tmp_path / "nothing"), *words]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and "nothing is not a folder" in error


def test_loading_sees_another_batch(script, monkeypatch, capsys):
    loading = script("loading")
    batch = loading.Peers.batch

    def other(self, step):
        given = batch(self, step)
        given.label[0, 0, 0, 0] += 1
        return given

    monkeypatch.setattr(loading.Peers, "batch", other)
    assert loading.main(["--quick"]) == 1
    assert last_line(capsys.readouterr().out)["exact"] is False


# --- the page --------------------------------------------------------------------------------------------------------


@pytest.fixture
def everything(script, monkeypatch):
    """The module of all.py; the peak of this processor does not depend on the moment."""
    module = script("all")
    monkeypatch.setattr(module.common, "limits", lambda: {"processor": "an abacus"})
    return module


@pytest.fixture
def fakes(tmp_path):
    """fakes(subject=(exit status, last line)) -> a folder of scripts that print a table of their arguments."""

    def write(**changes):
        for name in RATIOS:
            status, line = changes.get(name, (0, ending(name)))
            (tmp_path / f"{name}.py").write_text(
                f"import sys\nprint('| table of {name} |', *sys.argv[1:])\nprint({line!r})\nsys.exit({status})")
        return tmp_path

    return write


def ending(name, exact=True):
    return json.dumps({"subject": name, "ratio": 10.0, "exact": exact, "share": 0.25,
                       "targets": {"ratio": RATIOS[name]}, "limits": {"share": 0.3}})


def test_the_page_has_every_figure_and_what_was_printed(everything, fakes, tmp_path, capsys):
    out = tmp_path / "docs" / "speed.md"
    assert everything.main(["--out", str(out)], fakes()) == 0
    text = out.read_text()
    assert "| metrics | ratio | 10 | at least 60 | no | yes |" in text
    assert "| memory | ratio | 10 | at least 2 | yes | yes |" in text
    assert text.count("| share | 0.25 | at most 0.3 | yes | yes |") == 6 and "an abacus" in text
    places = [text.index(f"## {name.capitalize()}\n\n| table of {name} |\n") for name in RATIOS]
    assert places == sorted(places) and text.index("| metrics | ratio") < places[0]
    assert "{" not in text
    out.unlink()
    assert everything.main(["--out", str(out)], fakes()) == 0 and out.read_text() == text
    assert "[6/6] memory" in capsys.readouterr().err


@pytest.mark.parametrize(("change", "reason"), [
    ((3, ending("step")), "step.py failed (exit status 3)"),
    ((1, "Traceback"), "step.py failed (exit status 1)"),
    ((1, ending("step", exact=False)), "step.py found other results than the peers' (exit status 1)"),
    ((0, "done"), "step.py: its last line has no JSON object"),
    ((0, ending("step").replace('"share": 0.25', '"lost": 1')), "step.py: its last line has no share"),
    ((0, '{"subject": "step", "ratio": 1, "targets": {}}'), "step.py: its last line has no exact"),
])  # fmt: skip
def test_a_script_that_fails_is_named_and_nothing_is_written(everything, fakes, tmp_path, capsys, change, reason):
    out = tmp_path / "speed.md"
    out.write_text("the former page")
    assert everything.main(["--out", str(out)], fakes(step=change)) == 1
    output, error = capsys.readouterr()
    assert error.splitlines()[-1] == f"{reason}; nothing is written" and out.read_text() == "the former page"
    assert "table of loading" not in output


def test_some_subjects_and_quick_write_nothing(everything, fakes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(everything, "DOC", tmp_path / "speed.md")
    assert everything.main(["--only", "loading,metrics"], fakes()) == 0
    output, error = capsys.readouterr()
    assert "table of loading" in output and "table of step" not in output and "[2/2] metrics, after" in error
    assert everything.main(["--quick"], fakes()) == 0
    assert "| table of step | --quick" in capsys.readouterr().out
    assert not (tmp_path / "speed.md").exists()
    assert everything.main([], fakes()) == 0 and (tmp_path / "speed.md").exists()


def test_an_unknown_subject_is_refused(everything, capsys):
    with pytest.raises(SystemExit) as exit:
        everything.main(["--only", "loading,speed"])
    assert exit.value.code == 2 and "'speed' is unknown" in capsys.readouterr().err


def test_the_committed_page_is_of_these_scripts():
    text = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    for name, ratio in RATIOS.items():
        assert f"## {name.capitalize()}\n" in text and f"| {name} | ratio | " in text
        [row] = [line for line in text.splitlines() if line.startswith(f"| {name} | ratio | ")]
        assert f" | at least {ratio:g} | " in row and row.endswith("| yes |")


def test_limits_names_the_processor_and_its_peaks(script):
    found = script("all").common.limits(side=64, rounds=1)
    assert found["processor"] and sum(value.endswith(" GFLOP/s") for value in found.values()) == 2


# --- the GPU's script, on the CPU ------------------------------------------------------------------------------------

ON_CPU = ["--device", "cpu", "--quick"]


def test_all_sections_run_on_the_cpu(script, tmp_path, capsys):
    gpu, out = script("gpu"), tmp_path / "gpu.md"
    assert gpu.main([*ON_CPU, "--methods", "ua_mt,bcp", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    figures = last_line(text)
    assert figures["subject"] == "gpu" and figures["exact"] is True and figures["failures"] == []
    assert set(figures["targets"]) == {"ratio", "cases_ratio"} <= set(figures)
    keys = ["peak_bf16", "peak_fp32", "ua_mt_ms", "bcp_ms", "ua_mt_compiled_ms", "bcp_compiled_ms",
            "minutes", "evaluate_32-true", "evaluate_bf16-mixed"]
    assert all(figures[key] > 0 for key in keys)
    verdict = text.strip().splitlines()[-2]
    assert verdict.startswith("Verdict on ") and "2 of 2 methods agree with the CPU" in verdict
    assert "resume is exact" in verdict and verdict.endswith("failed: nothing")
    assert out.read_text().strip().endswith(verdict) and "{" not in out.read_text()


def test_a_section_that_fails_leaves_the_others(script, monkeypatch, capsys):
    gpu = script("gpu")

    def broken(*args, **settings):
        raise RuntimeError("out of\nluck")

    monkeypatch.setattr(gpu, "evaluate", broken)
    monkeypatch.setattr(gpu, "resume", broken)
    sections = [broken if section.__name__ == "resume" else section for section in gpu.SECTIONS]
    broken.__doc__ = "Resume"
    monkeypatch.setattr(gpu, "SECTIONS", sections)
    assert gpu.main([*ON_CPU, "--methods", "supervised"]) == 1
    text = capsys.readouterr().out
    figures = last_line(text)
    assert figures["failures"] == ["evaluation in 32-true", "evaluation in bf16-mixed", "broken"]
    assert text.count("failed: RuntimeError: out of luck\n") == 3
    assert figures["supervised_ms"] > 0 and figures["ratio"] == 0 and "resume is not exact" in text


def test_another_step_on_the_device_is_found(script, monkeypatch, capsys):
    gpu = script("gpu")
    built = []
    build = gpu.run.build_method

    def build_another(*args):
        built.append(build(*args))
        if len(built) == 2:
            for parameter in built[-1].parameters():
                parameter.data += 0.1
        return built[-1]

    monkeypatch.setattr(gpu.run, "build_method", build_another)
    monkeypatch.setattr(gpu, "SECTIONS", (gpu.agreement,))
    assert gpu.main([*ON_CPU, "--methods", "supervised"]) == 1
    figures = last_line(capsys.readouterr().out)
    assert figures["exact"] is False and figures["failures"] == ["supervised differs from the CPU"]


def test_random_numbers_are_drawn_by_the_cpu(script):
    gpu = script("gpu")
    torch.manual_seed(0)
    expected = [torch.rand(5), torch.randn(3)][1]
    torch.manual_seed(0)
    with gpu.DrawnByCPU():
        drawn = torch.rand(5, device="meta")  # for which the CPU's generator would not be asked
        assert torch.equal(torch.randn(3), expected)
    assert drawn.device.type == "meta" and drawn.shape == (5,)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_without_cuda_it_says_so(script, capsys):
    assert script("gpu").main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("words", [["--device", "cpu"], [*ON_CPU, "--methods", "ua_mt,uamt"],
                                   [*ON_CPU, "--iterations", "0"]])
def test_bad_arguments_of_the_gpu_script(script, words):
    with pytest.raises(SystemExit) as exit:
        script("gpu").main(words)
    assert exit.value.code == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_all_sections_run_on_cuda(script, capsys):
    assert script("gpu").main(["--quick"]) == 0
    assert last_line(capsys.readouterr().out)["failures"] == []
