//! Everything that can happen to the cache at once, in thousands of random orders, against what must hold in any order.
//!
//! A schedule is a seed: requests as `Proxy` makes them, callers that hang up, answers of all kinds, revocations,
//! rotations, changes of principal, time. Between any two calls of the cache anything else may come. That is every order
//! there is, since each call takes the one lock once and does all its work under it; a result does, too. So loom and
//! shuttle would add only orders within std's `Mutex` and tokio's `watch`, whose authors try them, and would want both
//! replaced in `cache`, `clock` and what flights run in. What is judged here is judged by a plain list of all that went
//! upstream, not by another cache.

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
/// Each with its uid and its id: requests and revocations use either.
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

/// One request that went upstream. Its number is in its answer.
struct Sent {
    begun: usize,
    key: Key,
    principal: &'static str,
    /// Both names.
    connector: [&'static str; 2],
    buffer: Duration,
    /// The last one for the same thing, if it was under way and would have done.
    joinable: Option<usize>,
    tell: Option<oneshot::Sender<Result<Answer, RequestError>>>,
    is_finished: bool,
    panics: bool,
    /// Sent for somebody who was gone by then.
    stray: bool,
    expires_at: Timestamp,
}

/// What one caller asks.
#[derive(Clone)]
struct Wish {
    connector: [&'static str; 2],
    /// By which of its names.
    name: &'static str,
    body: &'static str,
    forced: bool,
    client: Option<Client>,
    begun: usize,
}

impl Wish {
    fn buffer(&self) -> Duration {
        Duration::from_secs(if self.body.contains("validity") { 120 } else { 30 })
    }
}

/// What the judge knows.
struct World {
    step: usize,
    sent: Vec<Sent>,
    identities: Vec<(Identity, &'static str)>,
    /// When each connector was revoked.
    revoked: HashMap<[&'static str; 2], Vec<usize>>,
    /// When anything was last revoked or the cache emptied: which flights that discards is the cache's affair.
    discarded: usize,
    /// The newest identity that the cache has seen.
    seen: u64,
    /// When a fresh answer for a key was insisted on.
    forced: HashMap<Key, Vec<usize>>,
}

type Shared = Rc<RefCell<World>>;
type Caller = Pin<Box<dyn Future<Output = (Wish, &'static str, Fetched)>>>;

/// Lets anything else happen in between.
async fn meanwhile() {
    let mut polled = false;
    std::future::poll_fn(|_| match std::mem::replace(&mut polled, true) {
        true => Poll::Ready(()),
        false => Poll::Pending,
    })
    .await;
}

fn parse(identity: &Identity, wish: &Wish) -> TokenRequest {
    key::parse(identity.principal().expect("one"), wish.name, wish.body.as_bytes()).expect("an object")
}

/// A token request, as `Proxy::token` makes it.
async fn call(cache: Cache, world: Shared, mut wish: Wish) -> (Wish, &'static str, Fetched) {
    wish.begun = world.borrow().step;
    let newest = || world.borrow().identities.last().expect("one").clone();
    let (identity, who) = newest();
    let ask = |request| CacheRequest { request, connector: wish.name.into(), forced: wish.forced, client: wish.client };
    meanwhile().await;
    let principal = identity.principal().expect("one");
    let known = match cache.find_by_bytes(principal, wish.name, wish.body.as_bytes(), wish.forced, wish.client) {
        ByteLookup::Found(found) => return (wish, who, Fetched::Found(found)),
        ByteLookup::Known(request) => request,
        ByteLookup::Unknown => {
            let request = parse(&identity, &wish);
            meanwhile().await;
            if let Some(found) = cache.find(principal, wish.name, wish.body.as_bytes(), &ask(request)) {
                return (wish, who, Fetched::Found(found));
            }
            request
        }
    };
    meanwhile().await;
    let (first, (identity, who)) = (principal, newest());
    let principal = identity.principal().expect("one");
    meanwhile().await;
    let request = if first == principal { known } else { parse(&identity, &wish) };
    let fetched = cache.fetch(ask(request), principal, || {
        let answer = world.borrow_mut().send(&wish, request, who);
        async move { answer.await.unwrap_or_else(|_| resume_unwind(Box::new("on purpose"))) }
    });
    let fetched = fetched.await;
    (wish, who, fetched)
}

impl World {
    fn send(
        &mut self,
        wish: &Wish,
        request: TokenRequest,
        principal: &'static str,
    ) -> oneshot::Receiver<Result<Answer, RequestError>> {
        let (tell, told) = oneshot::channel();
        let buffer = wish.buffer();
        let last = (0..self.sent.len()).rfind(|n| self.sent[*n].key == request.key);
        let joinable = last.filter(|n| !self.sent[*n].is_finished && self.sent[*n].buffer >= buffer);
        if wish.forced {
            self.forced.entry(request.key).or_default().push(self.step);
        }
        self.sent.push(Sent {
            begun: self.step,
            key: request.key,
            principal,
            connector: wish.connector,
            buffer,
            joinable,
            tell: Some(tell),
            is_finished: false,
            panics: false,
            stray: false,
            expires_at: Timestamp::from_millis(0),
        });
        told
    }

    /// Which request upstream an answer comes from.
    fn source(&self, outcome: &Outcome) -> Option<usize> {
        let text = match outcome {
            Ok(answer) => String::from_utf8(answer.body.to_vec()).expect("text"),
            Err(error) => error.message.clone(),
        };
        text.split('#').nth(1).map(|number| number.parse().expect("a number"))
    }

    /// What must hold for an answer that a caller gets.
    fn judge(&self, wish: &Wish, who: &'static str, fetched: &Fetched, now: Timestamp) {
        let (outcome, role) = match fetched {
            Fetched::Found(Found::Hit { answer, .. }) => (Ok(answer.clone()), None),
            Fetched::Found(Found::Held { outcome, left, .. }) => {
                assert!(!left.is_zero() && *left <= grant::MAX_HOLD);
                (outcome.clone(), None)
            }
            Fetched::Flight(role, result) => (result.outcome.clone(), Some(*role)),
        };
        let Some(number) = self.source(&outcome) else {
            let is_why = |sent: &Sent| sent.panics && sent.principal == who && sent.connector == wish.connector;
            assert!(self.sent.iter().any(is_why), "broken off for nothing");
            return;
        };
        let sent = &self.sent[number];
        assert_eq!((sent.principal, sent.connector), (who, wish.connector), "somebody else's answer");
        let is_token = outcome.is_ok_and(|answer| answer.status == 200);
        if is_token {
            let last = |steps: Option<&Vec<usize>>| steps?.iter().rfind(|step| **step < wish.begun).copied();
            assert!(last(self.revoked.get(&wish.connector)) < Some(sent.begun), "revoked before it was asked for");
            assert!(last(self.forced.get(&sent.key)) <= Some(sent.begun), "older than what was insisted on");
            assert!(!wish.forced || sent.begun >= wish.begun, "not fresh");
        }
        if let Fetched::Found(Found::Hit { .. }) = fetched {
            assert!(is_token && sent.expires_at.since(now) > wish.buffer(), "too close to its end");
        }
        if role == Some(Role::Collapsed) {
            assert!(sent.buffer >= wish.buffer(), "joined one that might bring a token too close to its end");
        }
        if role == Some(Role::Led) {
            let joinable = sent.joinable.map(|n| &self.sent[n]).filter(|other| other.begun > self.discarded);
            let is_needless = joinable.is_some_and(|other| !other.stray && !sent.stray);
            assert!(!is_needless, "two requests upstream for one thing");
        }
    }
}

/// A cache, its callers, and what goes on around them.
struct Stage {
    runtime: Runtime,
    cache: Cache,
    clock: Clock,
    world: Shared,
    identity: watch::Sender<Arc<Identity>>,
    callers: Vec<Caller>,
}

impl Stage {
    fn new() -> Self {
        let clock = Clock::test(Timestamp::from_millis(NOW_MS));
        let (identity, published) = watch::channel(Arc::new(identity_of(PRINCIPALS[0], 1)));
        let few = Limits { max_entries: NonZeroUsize::new(3).expect("not zero"), ..limits() };
        let world = World {
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
            world: Rc::new(RefCell::new(world)),
            callers: Vec::new(),
        }
    }

    fn step(&mut self, random: &mut Random) {
        self.world.borrow_mut().step += 1;
        match random.below(100) {
            0..15 => self.ask(random),
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
                let world = &mut *self.world.borrow_mut();
                world.revoked.entry(connector).or_default().push(world.step);
                world.discarded = world.step;
            }
            90 => {
                self.cache.clear();
                let mut world = self.world.borrow_mut();
                world.discarded = world.step;
            }
            91..97 => {
                let mut world = self.world.borrow_mut();
                let (_, who) = *world.identities.last().expect("one");
                let next = if random.percent(50) { who } else { random.one_of(&PRINCIPALS) };
                let generation = world.identities.len() as u64 + 1;
                world.identities.push((identity_of(next, generation), next));
                self.identity.send_replace(Arc::new(identity_of(next, generation)));
            }
            97.. => self.clock.advance(Duration::from_secs(random.one_of(&[1, 40, 90, 4000]))),
            _ => {}
        }
        self.check_the_books();
    }

    fn ask(&mut self, random: &mut Random) {
        let connector = random.one_of(&CONNECTORS);
        let wish = Wish {
            connector,
            name: connector[usize::from(random.percent(25))],
            body: random.one_of(&BODIES),
            forced: random.percent(15),
            client: random.percent(30).then(|| self.cache.client(random.one_of(&CLIENTS).as_bytes())),
            begun: 0,
        };
        self.callers.push(Box::pin(call(self.cache.clone(), self.world.clone(), wish)));
    }

    /// Lets a caller go on, and judges what it gets.
    fn poll(&mut self, caller: usize) -> bool {
        let _inside = self.runtime.enter();
        let polled = self.callers[caller].as_mut().poll(&mut Context::from_waker(Waker::noop()));
        self.note_who_it_is();
        let Poll::Ready((wish, who, fetched)) = polled else { return false };
        drop(self.callers.swap_remove(caller));
        self.world.borrow().judge(&wish, who, &fetched, self.clock.now());
        true
    }

    /// Upstream answers one of the requests that are there.
    fn answer(&mut self, random: &mut Random) {
        let mut world = self.world.borrow_mut();
        let open: Vec<usize> = (0..world.sent.len()).filter(|n| world.sent[*n].tell.is_some()).collect();
        if open.is_empty() {
            return;
        }
        let number = random.one_of(&open);
        let sent = &mut world.sent[number];
        let tell = sent.tell.take().expect("open");
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
            // What never went out was not insisted on.
            2 => {
                let (key, begun) = (sent.key, sent.begun);
                world.forced.entry(key).or_default().retain(|step| *step != begun);
                Err(RequestError::new(Code::LocalRateLimit, format!("#{number}#")))
            }
            3 => {
                sent.panics = true;
                return drop(tell);
            }
            _ => Ok(answer(200, &body)),
        };
        // Nobody listens if the runtime has dropped the flight, which it never does.
        assert!(tell.send(outcome).is_ok(), "a flight was cancelled");
    }

    /// Lets the flights that were answered finish.
    fn run_flights(&mut self) {
        self.runtime.block_on(async {
            for _ in 0..3 {
                tokio::task::yield_now().await;
            }
        });
        self.world.borrow_mut().sent.iter_mut().for_each(|sent| sent.is_finished = sent.tell.is_none());
    }

    /// After each step: all that is kept is of one principal, so a change of it discards.
    fn note_who_it_is(&self) {
        let generation = self.cache.lock().identity.borrow().generation;
        let world = &mut *self.world.borrow_mut();
        let who = |generation: u64| world.identities.get(generation.checked_sub(1)? as usize).map(|(_, who)| *who);
        let now = who(generation);
        if now != who(world.seen) {
            world.discarded = world.step;
        }
        world.seen = generation;
        let sent = world.sent.iter_mut().filter(|sent| sent.begun == world.step);
        sent.for_each(|sent| sent.stray = Some(sent.principal) != now);
    }

    fn check_the_books(&self) {
        self.note_who_it_is();
        let (inner, world) = (self.cache.lock(), self.world.borrow());
        let lengths: usize = inner.entries.iter().map(|(_, entry)| entry.answer.body.len()).sum();
        assert_eq!(inner.bytes, lengths, "bytes are counted wrongly");
        assert!(inner.entries.len() <= 3);
        for (key, entry) in &inner.entries {
            let sent = &world.sent[world.source(&Ok(entry.answer.clone())).expect("a number")];
            assert_eq!((sent.key, entry.expires_at), (*key, sent.expires_at), "stored under another key");
            let owner = Some(sent.principal);
            let current = world.identities.get(inner.identity.borrow().generation as usize - 1).map(|(_, who)| *who);
            assert_eq!(owner, current, "kept from another principal");
        }
    }

    /// Nothing more is asked for, all is answered: everybody gets an answer, and nothing is left behind.
    fn end(mut self, random: &mut Random) {
        for _ in 0..STEPS {
            let mut caller = 0;
            while caller < self.callers.len() {
                self.world.borrow_mut().step += 1;
                if !self.poll(caller) {
                    caller += 1;
                }
            }
            self.answer(random);
            self.run_flights();
        }
        assert!(self.callers.is_empty(), "{} wait for ever", self.callers.len());
        assert!(self.cache.lock().flights.is_empty(), "a key is blocked");
        self.check_the_books();
    }
}

#[test]
fn in_any_order_nobody_gets_what_is_not_theirs_and_everybody_an_answer() {
    for seed in 0..SCHEDULES {
        let schedule = || {
            let (mut random, mut stage) = (Random(seed), Stage::new());
            (0..STEPS).for_each(|_| stage.step(&mut random));
            stage.end(&mut random);
        };
        assert!(catch_unwind(AssertUnwindSafe(schedule)).is_ok(), "the schedule of seed {seed} breaks a rule");
    }
}
