"""``launch``: a process that waits for ever ends, and says where it waited."""

from launch import torchrun


def test_what_waits_for_ever_ends_and_says_where(tmp_path):
    script = tmp_path / "waits.py"
    script.write_text("import os, time\nprint('rank', os.environ['RANK'], flush=True)\ntime.sleep(3600)\n")
    code, text = torchrun(script, seconds=15)
    assert code != 0
    assert "rank 0" in text
    assert "rank 1" in text
    assert text.count(f'File "{script}", line 3 in <module>') == 2, text


def test_one_process_a_folder_and_variables(tmp_path):
    (tmp_path / "says.py").write_text("import os\nprint(os.environ['WORLD_SIZE'], os.environ['SAID'], os.getcwd())\n")
    code, text = torchrun("says.py", processes=1, folder=tmp_path, SAID="this")
    assert code == 0, text
    assert f"1 this {tmp_path}\n" in text
