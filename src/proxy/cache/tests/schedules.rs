//! Everything that can happen to the cache concurrently, in thousands of random orders, checked against rules that hold
//! in any order.
//!
//! A schedule is a seed: requests as `Proxy` makes them, client disconnects, answers of all kinds, revocations,
//! rotations, changes of principal, passing time. Every call of the cache takes its one lock once and does all its work
//! under it, and so does the end of a fetch. The orders of those calls are therefore all that there are. loom and
//! shuttle would only add orders inside std's `Mutex` and tokio's `watch`. The rules are checked against a plain list
//! of all upstream requests, not against another cache.

use std::cell::RefCell;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use tokio::runtime::Runtime;

use super::*;

const SCHEDULES: u64 = 2500;
const STEPS: usize = 200;
/// The uid and the id of each. Requests and revocations use either.
const CONNECTORS: [[&str; 2]; 2] = [["slack/acme", "scl_slack"], ["slack/other", "scl_other"]];
const BODIES: [&str; 3] = ["{}", "{}", r#"{"validityBufferMs":120000}"#];
const CLIENTS: [&str; 2] = ["one", "two"];
const PRINCIPALS: [&str; 2] = ["ada", "bob"];

/// SplitMix64: small, and the same on every machine.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    fn percent(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    fn one_of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())]
    }
}

/// An upstream request. Its index is in its answer.
struct Sent {
    begun: usize,
    key: Key,
    principal: &'static str,
    /// Both names.
    connector: [&'static str; 2],
    buffer: Duration,
    /// The previous one with the same key, if it was in flight and its buffer was large enough.
    joinable: Option<usize>,
    sender: Option<oneshot::Sender<Result<Answer, RequestError>>>,
    is_finished: bool,
    panics: bool,
    /// Sent for a principal that was no longer current.
    stray: bool,
    expires_at: Timestamp,
}

/// A request of a client.
#[derive(Clone)]
struct Call {
    connector: [&'static str; 2],
    /// The connector's name in the request.
    name: &'static str,
    body: &'static str,
    forced: bool,
    client: Option<Client>,
    begun: usize,
}

impl Call {
    fn buffer(&self) -> Duration {
        Duration::from_secs(if self.body.contains("validity") { 120 } else { 30 })
    }
}

/// What the checks compare against.
struct Model {
    step: usize,
    sent: Vec<Sent>,
    identities: Vec<(Identity, &'static str)>,
    /// The steps at which each connector was revoked.
    revoked: HashMap<[&'static str; 2], Vec<usize>>,
    /// The last step at which the cache could discard flights.
    discarded: usize,
    /// The newest identity that the cache has seen.
    seen: u64,
    /// The steps at which a fresh token was forced for a key.
    forced: HashMap<Key, Vec<usize>>,
}

type Shared = Rc<RefCell<Model>>;
type Caller = Pin<Box<dyn Future<Output = (Call, &'static str, Fetched)>>>;

/// Lets anything else happen at this point.
async fn yield_once() {
    let mut polled = false;
    std::future::poll_fn(|_| match std::mem::replace(&mut polled, true) {
        true => Poll::Ready(()),
        false => Poll::Pending,
    })
    .await;
}

fn parse(identity: &Identity, call: &Call) -> TokenRequest {
    key::parse(identity.principal().expect("one"), call.name, call.body.as_bytes()).expect("an object")
}

/// A token request, as `Proxy::token` makes it.
async fn perform(cache: Cache, model: Shared, mut call: Call) -> (Call, &'static str, Fetched) {
    call.begun = model.borrow().step;
    let newest = || model.borrow().identities.last().expect("one").clone();
    let (identity, who) = newest();
    let cache_request = |token_request| CacheRequest {
        token_request,
        connector: call.name.into(),
        forced: call.forced,
        client: call.client,
    };
    yield_once().await;
    let principal = identity.principal().expect("one");
    let known = match cache.find_by_bytes(principal, call.name, call.body.as_bytes(), call.forced, call.client) {
        ByteLookup::Found(found) => return (call, who, Fetched::Found(found)),
        ByteLookup::Parsed(request) => request,
        ByteLookup::Unknown => {
            let request = parse(&identity, &call);
            yield_once().await;
            if let Some(found) = cache.find(principal, call.name, call.body.as_bytes(), &cache_request(request)) {
                return (call, who, Fetched::Found(found));
            }
            request
        }
    };
    yield_once().await;
    let (first, (identity, who)) = (principal, newest());
    let principal = identity.principal().expect("one");
    yield_once().await;
    let request = if first == principal { known } else { parse(&identity, &call) };
    let fetched = cache.fetch(cache_request(request), principal, || {
        let answer = model.borrow_mut().send(&call, request, who);
        async move { answer.await.unwrap_or_else(|_| resume_unwind(Box::new("on purpose"))) }
    });
    let fetched = fetched.await;
    (call, who, fetched)
}

impl Model {
    fn send(
        &mut self,
        call: &Call,
        request: TokenRequest,
        principal: &'static str,
    ) -> oneshot::Receiver<Result<Answer, RequestError>> {
        let (sender, receiver) = oneshot::channel();
        let buffer = call.buffer();
        let last = (0..self.sent.len()).rfind(|n| self.sent[*n].key == request.key);
        let joinable = last.filter(|n| !self.sent[*n].is_finished && self.sent[*n].buffer >= buffer);
        if call.forced {
            self.forced.entry(request.key).or_default().push(self.step);
        }
        self.sent.push(Sent {
            begun: self.step,
            key: request.key,
            principal,
            connector: call.connector,
            buffer,
            joinable,
            sender: Some(sender),
            is_finished: false,
            panics: false,
            stray: false,
            expires_at: Timestamp::from_millis(0),
        });
        receiver
    }

    /// The index of the upstream request that an answer comes from.
    fn source(&self, result: &UpstreamResult) -> Option<usize> {
        let text = match result {
            Ok(answer) => String::from_utf8(answer.body.to_vec()).expect("text"),
            Err(error) => error.message.clone(),
        };
        text.split('#').nth(1).map(|number| number.parse().expect("a number"))
    }

    /// Checks the answer to a request.
    fn check(&self, call: &Call, who: &'static str, fetched: &Fetched, now: Timestamp) {
        let (result, kind) = match fetched {
            Fetched::Found(Found::Hit { answer, .. }) => (Ok(answer.clone()), None),
            Fetched::Found(Found::RateLimited { result, left, .. }) => {
                assert!(!left.is_zero() && *left <= grant::MAX_RATE_LIMIT);
                (result.clone(), None)
            }
            Fetched::Upstream(kind, fetched) => (fetched.result.clone(), Some(*kind)),
        };
        let Some(number) = self.source(&result) else {
            let explains = |sent: &Sent| sent.panics && sent.principal == who && sent.connector == call.connector;
            assert!(self.sent.iter().any(explains), "an interrupted fetch that did not panic");
            return;
        };
        let sent = &self.sent[number];
        assert_eq!((sent.principal, sent.connector), (who, call.connector), "somebody else's answer");
        let is_token = result.is_ok_and(|answer| answer.status == 200);
        if is_token {
            let last = |steps: Option<&Vec<usize>>| steps?.iter().rfind(|step| **step < call.begun).copied();
            assert!(last(self.revoked.get(&call.connector)) < Some(sent.begun), "revoked before it was requested");
            assert!(last(self.forced.get(&sent.key)) <= Some(sent.begun), "older than the last forced fetch");
            assert!(!call.forced || sent.begun >= call.begun, "not fresh");
        }
        if let Fetched::Found(Found::Hit { .. }) = fetched {
            assert!(is_token && sent.expires_at.since(now) > call.buffer(), "too close to its expiry");
        }
        if kind == Some(CacheUse::Collapsed) {
            assert!(sent.buffer >= call.buffer(), "joined a flight with a smaller buffer");
        }
        if kind == Some(CacheUse::Miss) {
            let joinable = sent.joinable.map(|n| &self.sent[n]).filter(|other| other.begun > self.discarded);
            let is_needless = joinable.is_some_and(|other| !other.stray && !sent.stray);
            assert!(!is_needless, "two upstream requests for one key");
        }
    }
}

/// A cache, its callers and the model.
struct Simulation {
    runtime: Runtime,
    cache: Cache,
    clock: Clock,
    model: Shared,
    identity: watch::Sender<Arc<Identity>>,
    callers: Vec<Caller>,
}

impl Simulation {
    fn new() -> Self {
        let clock = Clock::test(Timestamp::from_millis(NOW_MS));
        let (identity, published) = watch::channel(Arc::new(identity_of(PRINCIPALS[0], 1)));
        let few = Limits { max_entries: NonZeroUsize::new(3).expect("not zero"), ..limits() };
        let model = Model {
            step: 0,
            sent: Vec::new(),
            identities: vec![(identity_of(PRINCIPALS[0], 1), PRINCIPALS[0])],
            revoked: HashMap::new(),
            discarded: 0,
            seen: 0,
            forced: HashMap::new(),
        };
        Self {
            runtime: tokio::runtime::Builder::new_current_thread().build().expect("a runtime"),
            cache: Cache::new(few, published, clock.clone(), TaskTracker::new()),
            identity,
            clock,
            model: Rc::new(RefCell::new(model)),
            callers: Vec::new(),
        }
    }

    fn step(&mut self, random: &mut Random) {
        self.model.borrow_mut().step += 1;
        match random.below(100) {
            0..15 => self.add_caller(random),
            15..60 if !self.callers.is_empty() => {
                let caller = random.below(self.callers.len());
                self.poll(caller);
            }
            60..64 if !self.callers.is_empty() => {
                let gone = random.below(self.callers.len());
                drop(self.callers.swap_remove(gone));
            }
            64..78 => self.answer(random),
            78..86 => self.run_flights(),
            86..90 => {
                let connector = random.one_of(&CONNECTORS);
                self.cache.evict(random.one_of(&connector));
                let model = &mut *self.model.borrow_mut();
                model.revoked.entry(connector).or_default().push(model.step);
                model.discarded = model.step;
            }
            90 => {
                self.cache.clear();
                let mut model = self.model.borrow_mut();
                model.discarded = model.step;
            }
            91..97 => {
                let mut model = self.model.borrow_mut();
                let (_, who) = *model.identities.last().expect("one");
                let next = if random.percent(50) { who } else { random.one_of(&PRINCIPALS) };
                let generation = model.identities.len() as u64 + 1;
                model.identities.push((identity_of(next, generation), next));
                self.identity.send_replace(Arc::new(identity_of(next, generation)));
            }
            97.. => self.clock.advance(Duration::from_secs(random.one_of(&[1, 40, 90, 4000]))),
            _ => {}
        }
        self.check_invariants();
    }

    fn add_caller(&mut self, random: &mut Random) {
        let connector = random.one_of(&CONNECTORS);
        let call = Call {
            connector,
            name: connector[usize::from(random.percent(25))],
            body: random.one_of(&BODIES),
            forced: random.percent(15),
            client: random.percent(30).then(|| self.cache.client(random.one_of(&CLIENTS).as_bytes())),
            begun: 0,
        };
        self.callers.push(Box::pin(perform(self.cache.clone(), self.model.clone(), call)));
    }

    /// Polls a caller and checks its answer if there is one.
    fn poll(&mut self, caller: usize) -> bool {
        let _inside = self.runtime.enter();
        let polled = self.callers[caller].as_mut().poll(&mut Context::from_waker(Waker::noop()));
        self.note_principal();
        let Poll::Ready((call, who, fetched)) = polled else { return false };
        drop(self.callers.swap_remove(caller));
        self.model.borrow().check(&call, who, &fetched, self.clock.now());
        true
    }

    /// Upstream answers one of the open requests.
    fn answer(&mut self, random: &mut Random) {
        let mut model = self.model.borrow_mut();
        let open: Vec<usize> = (0..model.sent.len()).filter(|n| model.sent[*n].sender.is_some()).collect();
        if open.is_empty() {
            return;
        }
        let number = random.one_of(&open);
        let sent = &mut model.sent[number];
        let sender = sent.sender.take().expect("open");
        let life = Duration::from_secs(random.one_of(&[20, 100, 3600, 9000]));
        sent.expires_at = self.clock.now().plus(life);
        let [uid, id] = sent.connector;
        let body = format!(
            r#"{{"token":"{}#{number}#","expiresAt":{},"connector":{{"id":"{id}","uid":"{uid}"}}}}"#,
            "x".repeat(random.below(40)),
            sent.expires_at.as_millis()
        );
        let outcome = match random.below(10) {
            0 => Ok(answer(500, &format!(r##"{{"error":"#{number}#"}}"##))),
            1 => Err(RequestError::new(Code::UpstreamTimeout, format!("#{number}#"))),
            4 => {
                let mut headers = HeaderMap::new();
                headers.insert("retry-after", 30.into());
                let body = format!(r##"{{"error":"#{number}#"}}"##);
                Ok(Answer::new(StatusCode::TOO_MANY_REQUESTS, &headers, body.as_bytes()))
            }
            // A request that was never sent forces nothing.
            2 => {
                let (key, begun) = (sent.key, sent.begun);
                model.forced.entry(key).or_default().retain(|step| *step != begun);
                Err(RequestError::new(Code::LocalRateLimit, format!("#{number}#")))
            }
            3 => {
                sent.panics = true;
                return drop(sender);
            }
            _ => Ok(answer(200, &body)),
        };
        // This fails if the flight was dropped, which must never happen.
        assert!(sender.send(outcome).is_ok(), "a flight was cancelled");
    }

    /// Finishes the flights that were answered.
    fn run_flights(&mut self) {
        self.runtime.block_on(async {
            for _ in 0..3 {
                tokio::task::yield_now().await;
            }
        });
        self.model.borrow_mut().sent.iter_mut().for_each(|sent| sent.is_finished = sent.sender.is_none());
    }

    /// Records the principal that the cache has seen. A change discards everything.
    fn note_principal(&self) {
        let generation = self.cache.lock().identity.borrow().generation;
        let model = &mut *self.model.borrow_mut();
        let who = |generation: u64| model.identities.get(generation.checked_sub(1)? as usize).map(|(_, who)| *who);
        let now = who(generation);
        if now != who(model.seen) {
            model.discarded = model.step;
        }
        model.seen = generation;
        let sent = model.sent.iter_mut().filter(|sent| sent.begun == model.step);
        sent.for_each(|sent| sent.stray = Some(sent.principal) != now);
    }

    fn check_invariants(&self) {
        self.note_principal();
        let (store, model) = (self.cache.lock(), self.model.borrow());
        let lengths: usize = store.entries.iter().map(|(_, entry)| entry.answer.body.len()).sum();
        assert_eq!(store.bytes, lengths, "bytes are counted wrongly");
        assert!(store.entries.len() <= 3);
        for (key, entry) in &store.entries {
            let sent = &model.sent[model.source(&Ok(entry.answer.clone())).expect("a number")];
            assert_eq!((sent.key, entry.expires_at), (*key, sent.expires_at), "stored under another key");
            let owner = Some(sent.principal);
            let current = model.identities.get(store.identity.borrow().generation as usize - 1).map(|(_, who)| *who);
            assert_eq!(owner, current, "kept for another principal");
        }
    }

    /// Answers everything: every caller gets an answer, and no flight is left.
    fn end(mut self, random: &mut Random) {
        for _ in 0..STEPS {
            let mut caller = 0;
            while caller < self.callers.len() {
                self.model.borrow_mut().step += 1;
                if !self.poll(caller) {
                    caller += 1;
                }
            }
            self.answer(random);
            self.run_flights();
        }
        assert!(self.callers.is_empty(), "{} callers never get an answer", self.callers.len());
        assert!(self.cache.lock().flights.is_empty(), "a key is blocked");
        self.check_invariants();
    }
}

#[test]
fn the_rules_hold_in_any_order() {
    for seed in 0..SCHEDULES {
        let schedule = || {
            let (mut random, mut simulation) = (Random(seed), Simulation::new());
            (0..STEPS).for_each(|_| simulation.step(&mut random));
            simulation.end(&mut random);
        };
        assert!(catch_unwind(AssertUnwindSafe(schedule)).is_ok(), "the schedule of seed {seed} breaks a rule");
    }
}
