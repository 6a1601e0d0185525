//! How much may go to upstream: so many requests at once, so many a second. What is beyond waits a moment for a place, or
//! is refused without having been sent (docs/security.md L1).
//!
//! A flight takes a place, not each caller that waits for it. The rate is counted when a request has its place and goes
//! out, not when it begins to wait: upstream never sees more than the rate, however the waiting went. Time is monotonic:
//! a wall clock that jumps back would refuse for as long as it jumped. It stands still while the machine sleeps, in which
//! nothing is sent, so the bucket is merely as full as before, and full again two seconds later.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::Instant;

use super::error::{Code, RequestError};
use super::reply::retry_after;

/// Requests to upstream at once.
const PLACES: usize = 16;
/// A request waits this long for a place.
const LONGEST_WAIT: Duration = Duration::from_secs(5);
/// What a caller that found no place is told to wait.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// Requests that may go out at once after a while of few.
const BURST: u32 = 40;
/// After so long one more may go out: 20 a second.
const REFILL: Duration = Duration::from_millis(50);

/// Admits requests to upstream.
pub(super) struct Admission {
    places: Semaphore,
    bucket: Mutex<Bucket>,
}

/// The right to send one request. Given back when it is dropped, which is to be when the answer is whole.
#[must_use]
pub struct Place<'a>(#[expect(dead_code, reason = "held for its drop")] SemaphorePermit<'a>);

impl Admission {
    /// All places free, the bucket full.
    pub(super) fn new() -> Self {
        Self { places: Semaphore::new(PLACES), bucket: Mutex::new(Bucket { full_at: Instant::now() }) }
    }

    /// A place; 503 if none becomes free in time, 429 if too many requests went out of late.
    pub(super) async fn admit(&self) -> Result<Place<'_>, RequestError> {
        let place = self.place().await?;
        match self.bucket().take(Instant::now()) {
            Ok(()) => Ok(place),
            Err(wait) => {
                let per_second = 1000 / REFILL.as_millis();
                let message = format!(
                    "More than {per_second} requests a second would go to Connect: this one was not sent. Try again."
                );
                Err(refusal(Code::LocalRateLimit, message, wait))
            }
        }
    }

    /// A place that is there now.
    pub(super) fn admit_at_once(&self) -> Option<Place<'_>> {
        let permit = self.places.try_acquire().ok()?;
        self.bucket().take(Instant::now()).ok().map(|()| Place(permit))
    }

    /// A place for what must get through: counted, but never refused for the rate.
    pub(super) async fn admit_at_any_rate(&self) -> Result<Place<'_>, RequestError> {
        let place = self.place().await?;
        let _ = self.bucket().take(Instant::now());
        Ok(place)
    }

    /// First come, first served.
    async fn place(&self) -> Result<Place<'_>, RequestError> {
        match tokio::time::timeout(LONGEST_WAIT, self.places.acquire()).await {
            Ok(Ok(permit)) => Ok(Place(permit)),
            // The semaphore is never closed.
            Ok(Err(_)) | Err(_) => {
                let waited = LONGEST_WAIT.as_secs();
                let message = format!(
                    "{PLACES} requests to Connect are under way, and none has ended for {waited} s. Try again."
                );
                Err(refusal(Code::Overloaded, message, RETRY_AFTER))
            }
        }
    }

    fn bucket(&self) -> MutexGuard<'_, Bucket> {
        self.bucket.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn refusal(code: Code, message: String, wait: Duration) -> RequestError {
    let mut error = RequestError::new(code, message);
    error.retry_after = Some(retry_after(wait));
    error
}

/// A token bucket, kept as the time at which it will be full: `BURST` tokens, one more after each `REFILL`.
struct Bucket {
    full_at: Instant,
}

impl Bucket {
    /// Takes one, or says how long until there is one.
    fn take(&mut self, now: Instant) -> Result<(), Duration> {
        let full_at = self.full_at.max(now) + REFILL;
        match full_at.duration_since(now).saturating_sub(REFILL * BURST) {
            Duration::ZERO => {
                self.full_at = full_at;
                Ok(())
            }
            lacking => Err(lacking),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of `tries` it gives at `now`.
    fn taken(bucket: &mut Bucket, now: Instant, tries: u32) -> u32 {
        (0..tries).map(|_| u32::from(bucket.take(now).is_ok())).sum()
    }

    #[test]
    fn forty_at_once_and_twenty_a_second() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut bucket = Bucket { full_at: start };
        for (ms, tries, expected) in [
            (0, 100, 40),
            (49, 1, 0),
            (50, 9, 1),
            (99, 1, 0),
            (100, 9, 1),
            (600, 99, 10),
            (650, 0, 0),
            (1650, 99, 21),
            (60_000, 100, 40),
        ] {
            assert_eq!(taken(&mut bucket, at(ms), tries), expected, "at {ms} ms");
        }
    }

    #[test]
    fn no_second_sees_more_than_sixty_however_it_is_asked() {
        let start = Instant::now();
        let mut bucket = Bucket { full_at: start };
        let times: Vec<u64> = (0..5000).filter(|ms| bucket.take(start + Duration::from_millis(*ms)).is_ok()).collect();
        for (i, first) in times.iter().enumerate() {
            let within = times[i..].iter().take_while(|ms| **ms < first + 1000).count();
            assert!(within <= 60, "{within} in the second from {first} ms on");
        }
        assert_eq!(times.len(), 40 + 99);
    }

    #[test]
    fn a_refusal_says_how_long_and_takes_nothing() {
        let start = Instant::now();
        let mut bucket = Bucket { full_at: start };
        assert_eq!(taken(&mut bucket, start, 40), 40);
        for _ in 0..3 {
            assert_eq!(bucket.take(start + Duration::from_millis(20)), Err(Duration::from_millis(30)));
        }
        assert_eq!(bucket.take(start + Duration::from_millis(50)), Ok(()));
    }

    #[test]
    fn a_clock_that_stands_still_or_goes_back_neither_refuses_for_long_nor_gives_more() {
        let start = Instant::now() + Duration::from_secs(60);
        let mut bucket = Bucket { full_at: start };
        assert_eq!(taken(&mut bucket, start, 50), 40);
        assert_eq!(taken(&mut bucket, start - Duration::from_secs(60), 50), 0);
        assert_eq!(taken(&mut bucket, start + REFILL * BURST, 50), 40);
    }

    #[tokio::test(start_paused = true)]
    async fn the_seventeenth_waits_its_turn_and_five_seconds_at_the_most() {
        let admission = Admission::new();
        let mut places = Vec::new();
        for _ in 0..PLACES {
            places.push(admission.admit().await.expect("a place"));
        }
        let begun = Instant::now();
        let refused = admission.admit().await.err().expect("none is free");
        assert_eq!((refused.code, begun.elapsed()), (Code::Overloaded, LONGEST_WAIT));
        assert_eq!(refused.retry_after, Some(retry_after(RETRY_AFTER)));

        let give_back = async {
            tokio::time::sleep(LONGEST_WAIT - REFILL).await;
            places.pop();
        };
        let (admitted, ()) = tokio::join!(admission.admit(), give_back);
        assert!(admitted.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn beyond_the_rate_it_refuses_all_but_what_must_get_through() {
        let admission = Admission::new();
        for _ in 0..BURST {
            drop(admission.admit().await.expect("within the burst"));
        }
        for _ in 0..100 {
            let refused = admission.admit().await.err().expect("beyond the burst");
            assert_eq!((refused.code, refused.retry_after), (Code::LocalRateLimit, Some(retry_after(REFILL))));
            drop(admission.admit_at_any_rate().await.expect("it must get through"));
        }
        tokio::time::advance(REFILL).await;
        drop(admission.admit_at_any_rate().await.expect("it must get through"));
        assert!(admission.admit().await.is_err(), "it was counted");
        tokio::time::advance(REFILL).await;
        assert!(admission.admit().await.is_ok(), "and leaves no debt");
    }

    #[tokio::test]
    async fn what_finds_no_place_costs_no_rate() {
        let admission = Admission::new();
        let places: Vec<_> = (0..PLACES).map(|_| admission.admit_at_once().expect("a place")).collect();
        assert!((0..100).all(|_| admission.admit_at_once().is_none()));
        drop(places);
        let rest = (0..100).filter(|_| admission.admit_at_once().is_some()).count();
        assert!(rest >= BURST as usize - PLACES, "{rest}");
    }
}
