"""What the configuration says about sessions that are shared with other daemons."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class SharingSettings:
    """Where sessions are shared, and what that may cost.

    Attributes
    ----------
    url : str
        Of an object store, see ``tiers.remote_bucket.Bucket``; the same for all replicas.
    secret_file : Path
        32 bytes, the same for all replicas; made if it is missing. It takes the place of the secret
        that a replica would make for itself below its data path.
    lease_s : float
        For how long others leave a session alone whose owner was not heard of.
    wait_s : float
        How long a request waits for a session that another daemon has, before it is refused.
    is_required : bool
        Refuse requests of sessions while the store cannot be reached; False: go on with what this
        replica has.
    """

    url: str
    secret_file: Path
    lease_s: float = 60.0
    wait_s: float = 5.0
    is_required: bool = False
