"""In-memory Hugging Face Hub for tests: an HTTP server on the loopback address of the test process.

    with Hub({"hf_alice": User("alice", orgs=("acme",)), "hf_reader": User("alice", role="read")}) as hub:
        ...                                          # clients whose HF_ENDPOINT is hub.url

Supported: accounts and permissions, creation of repositories, both upload protocols (LFS and Xet), commits, listings
and downloads. Not supported: pull requests, tags, discussions, datasets, multipart LFS. `Fault` injects errors into
selected requests; `hub.log` contains all requests with the status of the response.

Responses contain the fields that `huggingface_hub` reads; error messages and codes follow reports of users of the
public Hub. They have not been compared with the public Hub itself.
"""

from .server import COMMIT, CREATE, PREUPLOAD, WEIGHTS, Fault, Hub
from .store import File, HubError, Repo, User

__all__ = ["COMMIT", "CREATE", "PREUPLOAD", "WEIGHTS", "Fault", "File", "Hub", "HubError", "Repo", "User"]
