//! The message queue of one scale set, its session and its capacity, as a state machine without input or output.
//!
//! The queue belongs to the scale set, not to the session: what nobody acknowledged comes again, to a later session as well. Ids are
//! unique only within a sequence, and a sequence can begin anew.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use serde_json::Value;

/// Where ids of messages begin.
pub const FIRST_MESSAGE_ID: i64 = 100_000_001;
/// Most job messages in one response.
pub const MOST_IN_ONE_MESSAGE: usize = 50;

/// A session.
#[derive(Clone, Debug)]
pub struct Session {
    /// Its id.
    pub id: String,
    /// Who opened it.
    pub owner: String,
    /// When its owner was last heard of.
    pub seen: Instant,
    /// Polls that are open now: an owner who polls is alive.
    pub polls: usize,
}

/// The queue of one scale set.
#[derive(Debug)]
pub struct Queue {
    next_id: i64,
    pending: VecDeque<Value>,
    messages: VecDeque<Message>,
    session: Option<Session>,
    capacity: usize,
}

#[derive(Debug)]
struct Message {
    id: i64,
    body: String,
    delivered: Option<Instant>,
}

/// A message as it is delivered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delivery {
    /// Its id.
    pub id: i64,
    /// A JSON list of job messages, as text; may be empty.
    pub body: String,
}

impl Default for Queue {
    fn default() -> Self {
        Self { next_id: FIRST_MESSAGE_ID, pending: VecDeque::new(), messages: VecDeque::new(), session: None, capacity: 0 }
    }
}

impl Queue {
    /// Opens a session. There is one at a time: an abandoned one is held for `hold` after its last sign of life.
    ///
    /// # Errors
    /// The owner of the session that is there.
    pub fn open(&mut self, id: String, owner: &str, now: Instant, hold: Duration) -> Result<(), String> {
        self.release(now, hold);
        if let Some(session) = &self.session {
            return Err(session.owner.clone());
        }
        self.session = Some(Session { id, owner: owner.to_owned(), seen: now, polls: 0 });
        for message in &mut self.messages {
            message.delivered = None;
        }
        Ok(())
    }

    /// The session with this id, if it is still the one; hearing of it keeps it alive.
    pub fn touch(&mut self, id: &str, now: Instant, hold: Duration) -> Option<&mut Session> {
        self.release(now, hold);
        let session = self.session.as_mut().filter(|session| session.id == id)?;
        session.seen = now;
        Some(session)
    }

    /// Ends a session.
    pub fn close(&mut self, id: &str) -> bool {
        let found = self.session.as_ref().is_some_and(|session| session.id == id);
        if found {
            self.session = None;
        }
        found
    }

    /// Takes the session away, whoever has it.
    pub fn drop_session(&mut self) -> bool {
        self.session.take().is_some()
    }

    /// The session, if there is one that has not been abandoned for too long.
    pub fn session(&mut self, now: Instant, hold: Duration) -> Option<&Session> {
        self.release(now, hold);
        self.session.as_ref()
    }

    /// The session, abandoned or not.
    pub fn session_now(&self) -> Option<&Session> {
        self.session.as_ref()
    }

    /// A poll begins (`true`) or ends. An owner who polls is alive; after that the hold counts from the end of the poll.
    pub fn polling(&mut self, id: &str, begins: bool, now: Instant) {
        if let Some(session) = self.session.as_mut().filter(|session| session.id == id) {
            session.polls = if begins { session.polls + 1 } else { session.polls.saturating_sub(1) };
            session.seen = now;
        }
    }

    fn release(&mut self, now: Instant, hold: Duration) {
        if self.session.as_ref().is_some_and(|session| session.polls == 0 && now.saturating_duration_since(session.seen) >= hold) {
            self.session = None;
        }
    }

    /// What the owner said last that it can run; the header of a poll.
    pub fn set_capacity(&mut self, capacity: usize) -> bool {
        let changed = self.capacity != capacity;
        self.capacity = capacity;
        changed
    }

    /// What the owner said last that it can run.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// How many more jobs may be given out when so many are. Lowering the capacity never takes one back.
    pub fn room(&self, given: usize) -> usize {
        self.capacity.saturating_sub(given)
    }

    /// Something happened to a job.
    pub fn push(&mut self, event: Value) {
        self.pending.push_back(event);
    }

    /// A message with just this body.
    pub fn push_raw(&mut self, body: String) {
        self.seal();
        self.append(body);
    }

    fn append(&mut self, body: String) {
        self.messages.push_back(Message { id: self.next_id, body, delivered: None });
        self.next_id += 1;
    }

    fn seal(&mut self) {
        while !self.pending.is_empty() {
            let count = self.pending.len().min(MOST_IN_ONE_MESSAGE);
            let body = Value::Array(self.pending.drain(..count).collect()).to_string();
            self.append(body);
        }
    }

    /// The next message after `last`; or one up to `last` that nobody acknowledged for `redelivery`.
    pub fn next(&mut self, last: i64, now: Instant, redelivery: Duration) -> Option<Delivery> {
        if !self.messages.iter().any(|message| message.id > last) {
            self.seal();
        }
        let due = |message: &Message| message.delivered.is_none_or(|at| now.saturating_duration_since(at) >= redelivery);
        let message = self.messages.iter_mut().find(|message| message.id > last || due(message))?;
        message.delivered = Some(now);
        Some(Delivery { id: message.id, body: message.body.clone() })
    }

    /// Forgets a message. Whether it was there.
    pub fn acknowledge(&mut self, id: i64) -> bool {
        let before = self.messages.len();
        self.messages.retain(|message| message.id != id);
        before != self.messages.len()
    }

    /// The ids begin anew; what is not acknowledged gets new ones, too.
    pub fn restart_ids(&mut self) {
        self.next_id = FIRST_MESSAGE_ID;
        for message in &mut self.messages {
            message.id = self.next_id;
            message.delivered = None;
            self.next_id += 1;
        }
    }

    /// Messages that nobody acknowledged.
    pub fn unacknowledged(&self) -> usize {
        self.messages.len() + self.pending.len().div_ceil(MOST_IN_ONE_MESSAGE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOLD: Duration = Duration::from_secs(91);
    const AGAIN: Duration = Duration::from_secs(300);

    #[test]
    fn one_session_at_a_time() {
        let (mut queue, start) = (Queue::default(), Instant::now());
        queue.open("a".into(), "first", start, HOLD).unwrap();
        assert_eq!(queue.open("b".into(), "second", start + Duration::from_secs(60), HOLD), Err("first".into()));
        assert_eq!(queue.open("b".into(), "first", start + Duration::from_secs(90), HOLD), Err("first".into()));
        queue.open("b".into(), "second", start + Duration::from_secs(91), HOLD).unwrap();
        assert!(queue.touch("a", start + HOLD, HOLD).is_none());
        assert!(!queue.close("a") && queue.close("b"));
        queue.open("c".into(), "third", start + HOLD, HOLD).unwrap();
    }

    #[test]
    fn a_poll_or_a_refresh_keeps_a_session() {
        let (mut queue, start) = (Queue::default(), Instant::now());
        queue.open("a".into(), "x", start, HOLD).unwrap();
        queue.polling("a", true, start);
        assert!(queue.session(start + 2 * HOLD, HOLD).is_some());
        queue.polling("a", false, start + 2 * HOLD);
        assert!(queue.touch("a", start + 3 * HOLD - Duration::from_secs(1), HOLD).is_some());
        assert!(queue.session(start + 4 * HOLD, HOLD).is_none());
    }

    #[test]
    fn what_is_not_acknowledged_comes_again() {
        let (mut queue, start) = (Queue::default(), Instant::now());
        for number in 0..60 {
            queue.push(number.into());
        }
        let first = queue.next(0, start, AGAIN).unwrap();
        assert_eq!(first.id, FIRST_MESSAGE_ID);
        assert_eq!(serde_json::from_str::<Vec<i64>>(&first.body).unwrap().len(), 50);
        assert_eq!(queue.next(0, start, AGAIN), Some(first.clone()));
        let second = queue.next(first.id, start, AGAIN).unwrap();
        assert_eq!(second.id, FIRST_MESSAGE_ID + 1);
        assert!(queue.acknowledge(second.id) && !queue.acknowledge(second.id));
        assert_eq!(queue.next(second.id, start, AGAIN), None);
        assert_eq!(queue.next(second.id, start + AGAIN, AGAIN), Some(first.clone()));
        queue.open("s".into(), "new", start + AGAIN, HOLD).unwrap();
        assert_eq!(queue.next(0, start + AGAIN, AGAIN), Some(first));
    }

    #[test]
    fn a_sequence_can_begin_anew() {
        let (mut queue, start) = (Queue::default(), Instant::now());
        queue.push(1.into());
        let first = queue.next(0, start, AGAIN).unwrap();
        queue.acknowledge(first.id);
        queue.push(2.into());
        queue.restart_ids();
        // A client that keeps its cursor sees it only when it comes again; one that starts at 0 sees it at once.
        assert_eq!(queue.next(0, start, AGAIN).unwrap(), Delivery { id: FIRST_MESSAGE_ID, body: "[2]".into() });
        assert_eq!(queue.next(first.id, start, AGAIN), None);
    }

    #[test]
    fn capacity_bounds_what_is_given_and_takes_nothing_back() {
        let mut queue = Queue::default();
        assert_eq!(queue.room(0), 0);
        assert!(queue.set_capacity(3) && !queue.set_capacity(3));
        assert_eq!((queue.room(0), queue.room(3)), (3, 0));
        queue.set_capacity(1);
        assert_eq!(queue.room(3), 0);
    }
}
