"""A commit's files in a folder of their own."""

import shutil

import pytest
from gaugeblock.kernels.worktree import commit_of, git, state_of, top, worktree


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "--quiet")
    (folder / "file").write_text("first")
    git(folder, "add", ".")
    me = ("-c", "user.name=n", "-c", "user.email=e@localhost")
    git(folder, *me, "commit", "--quiet", "-m", "first")
    return folder


def listed(repository):
    return git(repository, "worktree", "list").count("\n") + 1


def test_the_files_are_there_for_as_long_as_they_are_needed(repository, tmp_path):
    (repository / "file").write_text("changed")
    with worktree(repository, tmp_path / "a", commit_of(repository, "HEAD", "--x")):
        assert (tmp_path / "a" / "file").read_text() == "first"
        assert listed(repository) == 2
    assert not (tmp_path / "a").exists()
    assert listed(repository) == 1


def test_what_a_killed_process_left_is_no_obstacle(repository, tmp_path):
    git(repository, "worktree", "add", "--detach", "--quiet", str(tmp_path / "a"), "HEAD")
    shutil.rmtree(tmp_path / "a")
    with worktree(repository, tmp_path / "a", "HEAD"):
        assert (tmp_path / "a" / "file").exists()
    assert listed(repository) == 1


def test_a_folder_that_cannot_be_removed_costs_no_result(repository, tmp_path):
    with worktree(repository, tmp_path / "a", "HEAD"):
        git(repository, "worktree", "lock", str(tmp_path / "a"))
    assert (tmp_path / "a").exists()


def test_what_is_no_repository_or_commit_is_named(repository, tmp_path):
    assert top(repository, "--x") == repository.resolve()
    with pytest.raises(ValueError, match=r"--x must name a commit of .*, got 'nowhere'"):
        commit_of(repository, "nowhere", "--x")
    with pytest.raises(ValueError, match="--x must be asked for in a repository: "):
        top(tmp_path, "--x")


def test_the_state_of_a_file_is_its_repositorys(repository, tmp_path):
    head = git(repository, "rev-parse", "HEAD")
    assert state_of(repository / "file") == (head, False)
    (repository / "untracked").write_text("")
    assert state_of(repository / "file") == (head, False)
    assert state_of(repository / "untracked") == (None, None)
    (repository / "file").write_text("changed")
    assert state_of(repository / "file") == (head, True)
    assert state_of(tmp_path / "nowhere") == (None, None)
