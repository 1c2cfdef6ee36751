"""A Hugging Face hub for the tests: real HTTP on loopback in the test process, nothing on disk.

    with Hub({"hf_alice": User("alice", orgs=("acme",)), "hf_reader": User("alice", role="read")}) as hub:
        ...                                          # clients whose HF_ENDPOINT is hub.url

It speaks what pushing and pulling models needs: accounts and rights, creating repositories, both ways of sending
weights (LFS and Xet), commits, listings and downloads. Left out: pull requests, tags, discussions, data sets, LFS in
parts. `Fault` breaks a chosen request in a chosen way; `hub.log` tells what was asked and what was answered.

Answers follow what `huggingface_hub` reads of them; wording and codes of refusals are what users of the public hub
report. They could not be compared with the public hub itself.
"""

from .server import COMMIT, CREATE, PREUPLOAD, WEIGHTS, Fault, Hub
from .store import File, Refusal, Repo, User

__all__ = ["COMMIT", "CREATE", "PREUPLOAD", "WEIGHTS", "Fault", "File", "Hub", "Refusal", "Repo", "User"]
