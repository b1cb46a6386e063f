"""A commit's files in a folder of their own, for as long as they are needed."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path


def git(folder, *arguments):
    """What git prints. Raises ValueError with git's own last line where it fails."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
    except OSError as error:
        raise ValueError(f"git must run, it does not: {error}") from None
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        raise ValueError(f"git {arguments[0]} in {folder}: {said}")
    return done.stdout.strip()


def top(folder, option):
    """The root of the repository that a folder is in; option: what needs one, for the error."""
    try:
        return Path(git(folder, "rev-parse", "--show-toplevel")).resolve()
    except ValueError as error:
        raise ValueError(f"{option} must be asked for in a repository: {error}") from None


def commit_of(repository, ref, option):
    """The commit that a name means; option: what the user gave it to, for the error."""
    try:
        return git(repository, "rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}")
    except ValueError:
        raise ValueError(f"{option} must name a commit of {repository}, got {ref!r}") from None


def state_of(file):
    """(commit, whether files differ from it) of what tracks a file; (None, None): nothing does."""
    file = Path(file).resolve()
    try:
        git(file.parent, "ls-files", "--error-unmatch", file.name)
        commit = git(file.parent, "rev-parse", "HEAD")
        return commit, bool(git(file.parent, "status", "--porcelain", "--untracked-files=no"))
    except ValueError:
        return None, None


@contextlib.contextmanager
def worktree(repository, folder, commit):
    """While it lasts, the commit's files are in the folder, which must not be there yet."""
    # what a killed process left behind
    git(repository, "worktree", "prune")
    git(repository, "worktree", "add", "--detach", "--quiet", str(folder), commit)
    try:
        yield
    finally:
        # a folder that cannot be removed must not cost the result
        with contextlib.suppress(ValueError):
            git(repository, "worktree", "remove", "--force", str(folder))
