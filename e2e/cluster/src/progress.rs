//! What a person sees while things happen: a line when a step ends, and a sign of life every half minute while it lasts.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

const HEARTBEAT: Duration = Duration::from_secs(30);

type Sink = Box<dyn Fn(&str) + Send + Sync>;

/// Takes progress lines. Clones share one clock and one sink.
#[derive(Clone)]
pub struct Progress(Arc<Inner>);

struct Inner {
    began: Instant,
    sink: Sink,
    running: Mutex<BTreeMap<u64, Running>>,
    next: AtomicU64,
}

struct Running {
    name: String,
    doing: String,
    began: Instant,
}

impl Progress {
    /// Lines go to `sink`, without a line break.
    pub fn new(sink: impl Fn(&str) + Send + Sync + 'static) -> Self {
        let inner =
            Arc::new(Inner { began: Instant::now(), sink: Box::new(sink), running: Mutex::new(BTreeMap::new()), next: AtomicU64::new(0) });
        let weak = Arc::downgrade(&inner);
        thread::spawn(move || beat(&weak));
        Self(inner)
    }

    /// Lines go to standard error.
    pub fn stderr() -> Self {
        Self::new(|line| {
            use std::io::Write;
            // A closed standard error is no reason to stop.
            let _ = writeln!(std::io::stderr(), "{line}");
        })
    }

    /// Says nothing.
    pub fn silent() -> Self {
        Self::new(|_| {})
    }

    /// Something worth a line that is not a step.
    pub fn note(&self, text: impl fmt::Display) {
        self.0.line(&text.to_string());
    }

    /// Starts a step; it is told about when it ends, or while it lasts long.
    pub fn step(&self, name: impl Into<String>) -> Step {
        let id = self.0.next.fetch_add(1, Ordering::Relaxed);
        let began = Instant::now();
        self.0.running().insert(id, Running { name: name.into(), doing: String::new(), began });
        Step { inner: Arc::clone(&self.0), id, began }
    }
}

impl Inner {
    fn line(&self, text: &str) {
        (self.sink)(&format!("[{:>6.1}s] {text}", self.began.elapsed().as_secs_f64()));
    }

    fn running(&self) -> MutexGuard<'_, BTreeMap<u64, Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A step under way. Dropped without [`done`](Self::done) it counts as failed or abandoned and says nothing: the error will.
pub struct Step {
    inner: Arc<Inner>,
    id: u64,
    began: Instant,
}

impl Step {
    /// What the step does now; shown by the heartbeat.
    pub fn doing(&self, what: impl Into<String>) {
        if let Some(running) = self.inner.running().get_mut(&self.id) {
            running.doing = what.into();
        }
    }

    /// The step succeeded.
    pub fn done(self, result: impl fmt::Display) {
        let took = self.began.elapsed();
        let name = self.inner.running().remove(&self.id).map(|running| running.name).unwrap_or_default();
        self.inner.line(&format!("{name}: {result} ({})", seconds(took)));
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        self.inner.running().remove(&self.id);
    }
}

fn beat(inner: &Weak<Inner>) {
    loop {
        thread::sleep(HEARTBEAT);
        let Some(inner) = inner.upgrade() else { return };
        let lines: Vec<String> = inner
            .running()
            .values()
            .filter(|running| running.began.elapsed() >= HEARTBEAT / 2)
            .map(|running| {
                let doing = if running.doing.is_empty() { "still at work" } else { &running.doing };
                format!("... {}: {doing} ({})", running.name, seconds(running.began.elapsed()))
            })
            .collect();
        for line in lines {
            inner.line(&line);
        }
    }
}

/// `0.3 s`, `42 s`, `3 min 7 s`.
pub fn seconds(duration: Duration) -> String {
    let secs = duration.as_secs_f64();
    if secs < 9.95 {
        format!("{secs:.1} s")
    } else if secs < 120.0 {
        format!("{secs:.0} s")
    } else {
        format!("{} min {} s", duration.as_secs() / 60, duration.as_secs() % 60)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_each_finished_step_once() {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&lines);
        let progress = Progress::new(move |line| sink.lock().unwrap().push(line.to_owned()));
        progress.step("etcd").done("started");
        drop(progress.step("never finished"));
        let lines = lines.lock().unwrap();
        assert_eq!(lines.len(), 1);
        assert!(lines[0].ends_with("etcd: started (0.0 s)"), "{}", lines[0]);
    }

    #[test]
    fn durations_read_well() {
        assert_eq!(seconds(Duration::from_millis(340)), "0.3 s");
        assert_eq!(seconds(Duration::from_secs(42)), "42 s");
        assert_eq!(seconds(Duration::from_secs(187)), "3 min 7 s");
    }
}
