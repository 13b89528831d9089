"""Which keys and values a request gets, which session it is of, and what becomes of both."""

import logging
import secrets
import time
from dataclasses import replace

from offload.daemon.engine_settings import SessionSettings
from offload.daemon.errors import QuotaExceeded
from offload.daemon.requests import Miss, Started
from offload.daemon.sharing.entry import Fetched
from offload.daemon.work.job import Job
from offload.daemon.work.matching import Known, Matcher
from offload.daemon.work.persistence import Persistence
from offload.daemon.work.session_book import Branch, Session, SessionBook
from offload.daemon.work.tally import Tally
from offload.errors import OffloadError

_LOG = logging.getLogger(__name__)

_NOTHING = Fetched(0, 0, 0.0)


class Placing:
    """Binds requests to branches and sessions. Used by the engine's thread.

    Parameters
    ----------
    settings : SessionSettings
    book : SessionBook
    matcher : Matcher
    persistence : Persistence
    tally : Tally
    """

    def __init__(
        self,
        settings: SessionSettings,
        book: SessionBook,
        matcher: Matcher,
        persistence: Persistence,
        tally: Tally,
    ) -> None:
        self._settings = settings
        self._book = book
        self._matcher = matcher
        self._persistence = persistence
        self._tally = tally
        self._writers: dict[int, Job] = {}

    def must_wait(self, job: Job) -> bool:
        """Whether another request is adding to the session of this one."""
        session = self._book.find(job.request.tenant, job.request.session)
        return session is not None and id(session) in self._writers

    def place(self, job: Job) -> None:
        """Find what is known of a prompt, and make it the request's.

        Raises
        ------
        CapacityError
            There is no room now. Nothing has changed.
        QuotaExceeded
            The tenant has as many sessions as it may.
        """
        request = job.request
        self._persistence.load_tenant(request.tenant)
        hinted = self._book.find(request.tenant, request.session)
        if hinted is None and request.session is not None and request.is_kept:
            self.check_count(request.tenant)
        wants_all = request.sampling.prompt_logprobs and not job.answer.num_tokens
        limit = 0 if wants_all else len(job.ids) - 1
        known = self._matcher.find(
            job.realm,
            job.ids.view,
            limit,
            hinted,
            is_kept=request.is_kept,
            is_new=hinted is None and request.session is not None,
            setback=job.setback,
        )
        job.branch, job.num_before = known.branch, len(known.branch.tokens)
        if request.is_kept:
            self._bind(job, known, hinted)
        is_first = job.started_s is None
        job.started_s = job.started_s or time.monotonic()
        if is_first or job.started is not None:
            self._note_start(job, known)
        if not known.restored_bytes and job.started is not None:
            job.mailbox.put(job.started)
            job.started = None

    def give_up(self, job: Job) -> None:
        """Take from a request what it has, because it is damaged; and from its session."""
        branch, session = job.branch, job.session
        self._part(job)
        job.setback = "corrupt"
        if branch is not None:
            self._book.close_branch(branch)
        if session is not None:
            self._persistence.forget_saved(session)

    def put_aside(self, job: Job) -> None:
        """Take from a request what it has, for others; it is saved if it is of a session."""
        branch, session = job.branch, job.session
        self._part(job)
        if branch is None:
            return
        if session is not None and session.branch is branch:
            self._persistence.try_save(session)
        self._book.close_branch(branch)

    def release(self, job: Job, *, is_kept: bool) -> None:
        """Part a request that has ended from its branch, which is kept or not."""
        branch, session = job.branch, job.session
        self._part(job)
        if branch is None:
            return
        branch.used_s, branch.is_on_host = time.time(), False
        if not is_kept or not job.request.is_kept or not len(branch.tokens):
            is_old = session is not None and session.branch is branch and branch.is_sound
            if not is_old or not self._cut_back(branch, job.num_before):
                self._book.close_branch(branch)
            if session is not None and session.is_automatic and not session.num_tokens:
                self._book.remove(session)
            return
        if session is None and len(branch.tokens) >= self._settings.auto_create_min_tokens:
            session = self._new_automatic(job)
        if session is None:
            self._book.close_branch(branch)
            return
        if session.branch is not branch:
            self._book.bind(session, branch)
        session.used_s = branch.used_s
        if self._settings.persist == "write_through":
            self._persistence.try_save(session)
        elif session.saved is not None and not session.dirty_tokens:
            self._persistence.change(session)

    def check_count(self, tenant: str) -> None:
        """Raise QuotaExceeded if a tenant has as many sessions as it may, all asked for by name."""
        mine, most = self._book.of(tenant), self._settings.max_per_tenant
        if len(mine) < most:
            return
        spare = [each for each in mine if each.is_automatic and not each.is_pinned]
        spare = [each for each in spare if not each.is_busy and id(each) not in self._writers]
        if not spare:
            raise QuotaExceeded(f"there are {len(mine)} sessions, the most are {most}")
        self._tally.evictions["none"] += 1
        self._persistence.delete(min(spare, key=lambda each: each.used_s), "evicted")

    def _bind(self, job: Job, known: Known, hinted: Session | None) -> None:
        """Find or make the session that the branch is of."""
        request, branch = job.request, known.branch
        session = hinted or branch.session
        if session is None and request.session is not None:
            parent = _parent(known)
            session = Session(job.realm, request.session, ttl_s=self._settings.ttl_s, parent=parent)
            self._book.add(session)
        elif session is None and job.num_prompt_tokens >= self._settings.auto_create_min_tokens:
            session = self._new_automatic(job, _parent(known))
        if session is None:
            return
        if session.branch is not branch:
            self._book.bind(session, branch)
            if session.saved is not None:
                session.saved.is_current = False
        job.session = session
        self._writers[id(session)] = job
        if not job.answer.num_tokens:
            session.num_requests += 1
            session.last_hit_share = known.cached.total / job.num_prompt_tokens
        session.used_s = branch.used_s = time.time()

    def _new_automatic(self, job: Job, parent: str | None = None) -> Session | None:
        """Return a session that nobody has named, if the tenant may have one more."""
        try:
            self.check_count(job.request.tenant)
        except QuotaExceeded as error:
            _LOG.info("no session is made: %s", error)
            return None
        return self._book.add(
            Session(
                job.realm,
                f"s-{secrets.token_hex(8)}",
                is_automatic=True,
                ttl_s=self._settings.ttl_s,
                parent=parent,
                num_requests=1,
            )
        )

    def _note_start(self, job: Job, known: Known) -> None:
        request, miss = job.request, known.miss
        if miss is not None and miss.reason == "cold" and request.session is not None:
            gone = self._persistence.why_gone(request.tenant, request.session)
            miss = Miss(miss.at_token, gone if not miss.at_token else "cold")
        if miss is not None:
            self._tally.misses[miss.reason] += 1
        fetched = job.fetched or _NOTHING
        num_remote = min(known.cached.disk, fetched.num_tokens)
        job.cached = replace(known.cached, disk=known.cached.disk - num_remote, remote=num_remote)
        job.started = Started(
            session=None if job.session is None else job.session.name,
            num_prompt_tokens=job.num_prompt_tokens,
            cached=job.cached,
            restored_bytes=known.restored_bytes,
            restore_s=known.restore_s + fetched.seconds,
            queue_s=job.queue_s,
            miss=miss,
        )

    def _cut_back(self, branch: Branch, num_tokens: int) -> bool:
        """Bring a branch back to what it was; return whether that can be done."""
        lost = len(branch.tokens) - num_tokens
        if not num_tokens:
            return False
        if lost and not self._matcher.can_crop:
            return False
        if lost:
            try:
                branch.cache.crop(-lost)
            except OffloadError as error:
                _LOG.warning("a session is not what it was before: %s", error)
                return False
            branch.tokens.truncate(num_tokens)
        return True

    def _part(self, job: Job) -> None:
        if job.session is not None:
            self._writers.pop(id(job.session), None)
        if job.branch is not None:
            job.branch.is_busy = False
        job.branch, job.session = None, None


def _parent(known: Known) -> str | None:
    """Return the session that a new one was forked from: one that it shares most of."""
    session = known.session
    is_parent = session is not None and 2 * known.cached.total >= session.num_tokens
    return session.name if session is not None and is_parent else None
