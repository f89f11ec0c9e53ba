//! What a runner pod's status says, as a pure function.

use k8s_openapi::api::core::v1::{ContainerState, ContainerStatus, Pod, PodStatus};
use mayfly_crds::names::RUNNER_CONTAINER;
use serde::Serialize;

/// Where a runner pod stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) enum Phase {
    /// It is being started, or waits for a job, or runs one.
    Alive {
        /// What it waits for, where the cluster says so (no room, say).
        waits: Option<Reason>,
    },
    /// It will not start without somebody's help (a wrong image, say).
    Stuck(Reason),
    /// The runner's process is over, or the pod is.
    Over {
        /// Exit code 0.
        success: bool,
        /// Why it is over where it did not end by itself: evicted, past its deadline, killed.
        reason: Option<Reason>,
    },
    /// It is being deleted.
    Leaving,
}

/// A word for programs and a sentence for a person.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Reason {
    /// The word.
    pub(crate) reason: String,
    /// The sentence.
    pub(crate) message: String,
}

impl Reason {
    /// From text.
    pub(crate) fn new(reason: impl Into<String>, message: impl Into<String>) -> Self {
        Self { reason: reason.into(), message: message.into() }
    }
}

/// Waiting reasons of the kubelet that do not pass by themselves within a start.
const STUCK: [&str; 8] = [
    "ImagePullBackOff",
    "ErrImageNeverPull",
    "InvalidImageName",
    "ImageInspectError",
    "CreateContainerConfigError",
    "CreateContainerError",
    "RunContainerError",
    "CrashLoopBackOff",
];

/// Where `pod` stands.
pub(crate) fn phase(pod: &Pod) -> Phase {
    if pod.metadata.deletion_timestamp.is_some() {
        return Phase::Leaving;
    }
    let Some(status) = &pod.status else {
        return Phase::Alive { waits: None };
    };
    match status.phase.as_deref() {
        Some("Succeeded") => return Phase::Over { success: true, reason: None },
        Some("Failed") => return Phase::Over { success: false, reason: Some(failure(status)) },
        _ => {}
    }
    if let Some(end) = runner_status(status).and_then(|s| s.state.as_ref()?.terminated.as_ref()) {
        let success = end.exit_code == 0;
        return Phase::Over { success, reason: (!success).then(|| failure(status)) };
    }
    let waiting = containers(status).find_map(|container| {
        let waiting = container.state.as_ref()?.waiting.as_ref()?;
        let reason = waiting.reason.clone().filter(|reason| STUCK.contains(&reason.as_str()))?;
        let message = format!("container {}: {}", container.name, waiting.message.as_deref().unwrap_or(&reason));
        Some(Reason { reason, message })
    });
    match waiting {
        Some(reason) => Phase::Stuck(reason),
        None => Phase::Alive { waits: unscheduled(status) },
    }
}

fn containers(status: &PodStatus) -> impl Iterator<Item = &ContainerStatus> {
    status.init_container_statuses.iter().flatten().chain(status.container_statuses.iter().flatten())
}

fn runner_status(status: &PodStatus) -> Option<&ContainerStatus> {
    status.container_statuses.iter().flatten().find(|container| container.name == RUNNER_CONTAINER)
}

fn unscheduled(status: &PodStatus) -> Option<Reason> {
    let condition = status.conditions.iter().flatten().find(|c| c.type_ == "PodScheduled" && c.status == "False")?;
    Some(Reason::new(
        condition.reason.clone().unwrap_or_else(|| "Unschedulable".to_owned()),
        condition.message.clone().unwrap_or_else(|| "no node takes the pod".to_owned()),
    ))
}

/// Why a pod failed: its own reason (eviction, deadline), else the runner's end.
fn failure(status: &PodStatus) -> Reason {
    if let Some(reason) = &status.reason {
        return Reason::new(reason.clone(), status.message.clone().unwrap_or_else(|| reason.clone()));
    }
    let ended = |container: &ContainerStatus| {
        let end = container.state.as_ref().and_then(|ContainerState { terminated, .. }| terminated.as_ref())?;
        let reason = end.reason.clone().unwrap_or_else(|| "Error".to_owned());
        (end.exit_code != 0).then(|| Reason::new(reason, format!("container {} ended with exit code {}", container.name, end.exit_code)))
    };
    runner_status(status)
        .and_then(ended)
        .or_else(|| containers(status).find_map(ended))
        .unwrap_or_else(|| Reason::new("PodFailed", "the pod failed and the cluster does not say why"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(status: &str) -> Pod {
        serde_json::from_str(&format!(r#"{{"metadata":{{"name":"p"}},"status":{status}}}"#)).expect("a pod")
    }

    #[test]
    fn each_state_is_told_apart() {
        assert_eq!(phase(&pod("{}")), Phase::Alive { waits: None });
        assert_eq!(phase(&pod(r#"{"phase":"Succeeded"}"#)), Phase::Over { success: true, reason: None });
        let evicted = phase(&pod(r#"{"phase":"Failed","reason":"Evicted","message":"low on memory"}"#));
        assert_eq!(evicted, Phase::Over { success: false, reason: Some(Reason::new("Evicted", "low on memory")) });
        let killed = r#"{"phase":"Running","containerStatuses":[{"name":"runner","image":"","imageID":"","ready":false,"restartCount":0,
            "state":{"terminated":{"exitCode":137,"reason":"OOMKilled"}}}]}"#;
        let reason = Reason::new("OOMKilled", "container runner ended with exit code 137");
        assert_eq!(phase(&pod(killed)), Phase::Over { success: false, reason: Some(reason) });
    }

    #[test]
    fn a_wrong_image_is_stuck_and_no_room_is_a_wait() {
        let image = r#"{"phase":"Pending","containerStatuses":[{"name":"runner","image":"","imageID":"","ready":false,"restartCount":0,
            "state":{"waiting":{"reason":"ErrImageNeverPull","message":"not present"}}}]}"#;
        assert!(matches!(phase(&pod(image)), Phase::Stuck(Reason { reason, .. }) if reason == "ErrImageNeverPull"));
        let room =
            r#"{"phase":"Pending","conditions":[{"type":"PodScheduled","status":"False","reason":"Unschedulable","message":"0/1 nodes"}]}"#;
        assert_eq!(phase(&pod(room)), Phase::Alive { waits: Some(Reason::new("Unschedulable", "0/1 nodes")) });
    }
}
