//! Limits the upstream requests by number and by rate. Requests beyond them wait for a permit for some time, or are
//! refused without being sent (docs/security.md L1).
//!
//! A single-flight fetch needs one permit, whatever the number of requests that wait for it. The rate counts requests
//! when they are sent, not when they start to wait, so upstream never sees more than the rate. Time is monotonic,
//! because a wall clock set back would block requests for as long as it was set back. The monotonic clock may stop
//! while the machine sleeps; nothing is sent then, so the bucket only refills later.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::Instant;

use super::error::{Code, RequestError};
use super::reply::retry_after;

/// Maximum number of concurrent upstream requests.
const MAX_CONCURRENT: usize = 16;
/// How long a request waits for a permit.
const MAX_WAIT: Duration = Duration::from_secs(5);
/// `Retry-After` of a request that got no permit.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// Size of the token bucket: the number of requests that can be sent at once.
const BURST: u32 = 40;
/// Time after which the bucket gains one token: 20 requests per second.
const REFILL: Duration = Duration::from_millis(50);

/// Hands out the permits.
pub(super) struct Admission {
    permits: Semaphore,
    bucket: Mutex<Bucket>,
}

/// Permits one upstream request. Drop it once the response is complete.
#[must_use]
pub struct Permit<'a>(#[expect(dead_code, reason = "released on drop")] SemaphorePermit<'a>);

impl Admission {
    /// All permits available, the bucket full.
    pub(super) fn new() -> Self {
        Self { permits: Semaphore::new(MAX_CONCURRENT), bucket: Mutex::new(Bucket { full_at: Instant::now() }) }
    }

    /// Waits for a permit. The error is a 503 if none becomes available in time, and a 429 above the rate.
    pub(super) async fn admit(&self) -> Result<Permit<'_>, RequestError> {
        let permit = self.acquire().await?;
        match self.bucket().take(Instant::now()) {
            Ok(()) => Ok(permit),
            Err(wait) => {
                let per_second = 1000 / REFILL.as_millis();
                let message = format!(
                    "More than {per_second} requests a second would go to Connect: this one was not sent. Try again."
                );
                Err(refusal(Code::LocalRateLimit, message, wait))
            }
        }
    }

    /// A permit, if there is one now.
    pub(super) fn try_admit(&self) -> Option<Permit<'_>> {
        let permit = self.permits.try_acquire().ok()?;
        self.bucket().take(Instant::now()).ok().map(|()| Permit(permit))
    }

    /// Waits for a permit for a request that must be sent: it counts towards the rate, but is not limited by it.
    pub(super) async fn admit_above_rate(&self) -> Result<Permit<'_>, RequestError> {
        let permit = self.acquire().await?;
        let _ = self.bucket().take(Instant::now());
        Ok(permit)
    }

    /// Waits for a permit, in order of arrival.
    async fn acquire(&self) -> Result<Permit<'_>, RequestError> {
        match tokio::time::timeout(MAX_WAIT, self.permits.acquire()).await {
            Ok(Ok(permit)) => Ok(Permit(permit)),
            // The semaphore is never closed.
            Ok(Err(_)) | Err(_) => {
                let waited = MAX_WAIT.as_secs();
                let message = format!(
                    "{MAX_CONCURRENT} requests to Connect are under way, and none has ended for {waited} s. Try again."
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

/// A token bucket of `BURST` tokens that gains one every `REFILL`, represented by the time at which it will be full.
struct Bucket {
    full_at: Instant,
}

impl Bucket {
    /// Takes a token; the error is the time until there is one.
    fn take(&mut self, now: Instant) -> Result<(), Duration> {
        let full_at = self.full_at.max(now) + REFILL;
        match full_at.duration_since(now).saturating_sub(REFILL * BURST) {
            Duration::ZERO => {
                self.full_at = full_at;
                Ok(())
            }
            wait => Err(wait),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of `tries` succeed at `now`.
    fn taken(bucket: &mut Bucket, now: Instant, tries: u32) -> u32 {
        (0..tries).map(|_| u32::from(bucket.take(now).is_ok())).sum()
    }

    #[test]
    fn allows_a_burst_of_40_and_20_a_second() {
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
    fn allows_at_most_60_in_any_second() {
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
    fn a_refusal_returns_the_wait_and_takes_no_token() {
        let start = Instant::now();
        let mut bucket = Bucket { full_at: start };
        assert_eq!(taken(&mut bucket, start, 40), 40);
        for _ in 0..3 {
            assert_eq!(bucket.take(start + Duration::from_millis(20)), Err(Duration::from_millis(30)));
        }
        assert_eq!(bucket.take(start + Duration::from_millis(50)), Ok(()));
    }

    #[test]
    fn tolerates_a_clock_that_stops_or_goes_back() {
        let start = Instant::now() + Duration::from_secs(60);
        let mut bucket = Bucket { full_at: start };
        assert_eq!(taken(&mut bucket, start, 50), 40);
        assert_eq!(taken(&mut bucket, start - Duration::from_secs(60), 50), 0);
        assert_eq!(taken(&mut bucket, start + REFILL * BURST, 50), 40);
    }

    #[tokio::test(start_paused = true)]
    async fn the_17th_request_waits_up_to_5_s() {
        let admission = Admission::new();
        let mut permits = Vec::new();
        for _ in 0..MAX_CONCURRENT {
            permits.push(admission.admit().await.expect("a permit"));
        }
        let begun = Instant::now();
        let refused = admission.admit().await.err().expect("no permit");
        assert_eq!((refused.code, begun.elapsed()), (Code::Overloaded, MAX_WAIT));
        assert_eq!(refused.retry_after, Some(retry_after(RETRY_AFTER)));

        let release = async {
            tokio::time::sleep(MAX_WAIT - REFILL).await;
            permits.pop();
        };
        let (admitted, ()) = tokio::join!(admission.admit(), release);
        assert!(admitted.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn above_the_rate_only_unlimited_requests_are_sent() {
        let admission = Admission::new();
        for _ in 0..BURST {
            drop(admission.admit().await.expect("within the burst"));
        }
        for _ in 0..100 {
            let refused = admission.admit().await.err().expect("beyond the burst");
            assert_eq!((refused.code, refused.retry_after), (Code::LocalRateLimit, Some(retry_after(REFILL))));
            drop(admission.admit_above_rate().await.expect("not limited"));
        }
        tokio::time::advance(REFILL).await;
        drop(admission.admit_above_rate().await.expect("not limited"));
        assert!(admission.admit().await.is_err(), "it counts towards the rate");
        tokio::time::advance(REFILL).await;
        assert!(admission.admit().await.is_ok(), "without further delay");
    }

    #[tokio::test]
    async fn a_request_without_a_permit_does_not_count_towards_the_rate() {
        let admission = Admission::new();
        let permits: Vec<_> = (0..MAX_CONCURRENT).map(|_| admission.try_admit().expect("a permit")).collect();
        assert!((0..100).all(|_| admission.try_admit().is_none()));
        drop(permits);
        let rest = (0..100).filter(|_| admission.try_admit().is_some()).count();
        assert!(rest >= BURST as usize - MAX_CONCURRENT, "{rest}");
    }
}
