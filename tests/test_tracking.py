import json

import pytest

from cm_train.tracking.metrics_file import MetricsFile


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_are_cut_back_to_the_resumed_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s}) + "\n" for s in (2, 4, 6, 8)))
    file = MetricsFile(path, 4)
    file.write({"step": 6, "again": True})
    file.sync()
    file.close()
    assert rows(path) == [{"step": 2}, {"step": 4}, {"step": 6, "again": True}]


def test_a_torn_last_line_is_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for torn in ('{"step": 4, "lo', '{"step": 4}', "\x00\x00", '"text"\n', "[1]\n"):
        path.write_text('{"step": 2}\n' + torn)
        MetricsFile(path, 100).close()
        assert rows(path) == [{"step": 2}], torn


def test_a_new_run_starts_with_an_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2}\n')
    MetricsFile(path, 0).close()
    assert path.read_text() == ""


def test_metrics_line_that_does_not_fit_on_the_disk_is_written_whole_later(tmp_path, monkeypatch):
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    file.write({"step": 2})
    real = file._file

    class Full:
        def __getattr__(self, name):
            return getattr(real, name)

        def write(self, line):
            return real.write(line[:5])

    file._file = Full()
    with pytest.raises(OSError, match="No space"):
        file.write({"step": 4})
    file._file = real
    file.write({"step": 6})
    file.close()
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 2}, {"step": 4}, {"step": 6}]
