//! The door against an API server that refuses, loses or says nothing.

use k8s_openapi::api::core::v1::{ObjectReference, Pod};
use mayfly_crds::RunnerPool;
use serde_json::json;

use super::scripted::{Answer, Server};
use super::*;

fn door(server: &Server) -> KubeIo {
    KubeIo::new(server.client(), None, Metrics::new())
}

#[tokio::test]
async fn a_deletion_means_this_very_object_and_one_that_is_gone_is_a_success() {
    let gone = [Answer::Refusal(404, "NotFound"), Answer::Refusal(409, "Conflict")];
    let server = Server::new(gone.into_iter().chain([Answer::Refusal(403, "Forbidden")]));
    let io = door(&server);
    for _ in 0..2 {
        io.delete_this::<Pod>("ns", "p", "uid-1", Some(2)).await.expect("gone");
    }
    let error = io.delete_this::<Pod>("ns", "p", "uid-1", Some(2)).await.expect_err("refused");
    assert_eq!(error.message(), "scripted: Forbidden");
    let call = &server.calls()[0];
    assert_eq!(call.what, "DELETE /api/v1/namespaces/ns/pods/p");
    assert_eq!(call.body["preconditions"], json!({"uid": "uid-1"}));
    assert_eq!(call.body["gracePeriodSeconds"], json!(2));
}

#[tokio::test]
async fn an_annotation_is_written_to_this_very_pod() {
    let server = Server::new([Answer::Refusal(409, "Conflict")]);
    door(&server).annotate_pod("ns", "p", "uid-1", &[("a/b", "c".to_owned())]).await.expect("another pod has the name");
    assert_eq!(server.calls()[0].body, json!({"metadata": {"uid": "uid-1", "annotations": {"a/b": "c"}}}));
}

#[tokio::test]
async fn a_status_is_merged_into_an_object_that_cannot_be_read() {
    let server = Server::new([Answer::Object(json!({"metadata": {"name": "ci"}, "spec": {"forge": "nonsense"}}))]);
    door(&server).patch_status::<RunnerPool>("ns", "ci", &json!({"scope": ""})).await.expect("written");
    let call = &server.calls()[0];
    assert_eq!(call.what, "PATCH /apis/mayfly.dev/v1alpha1/namespaces/ns/runnerpools/ci/status");
    assert_eq!((call.content.as_str(), &call.body), ("application/merge-patch+json", &json!({"status": {"scope": ""}})));
}

#[tokio::test(start_paused = true)]
async fn an_api_server_that_does_not_answer_holds_nobody_for_ever() {
    let server = Server::new([Answer::Silence]);
    let io = door(&server);
    let error = io.delete_this::<Pod>("ns", "p", "uid-1", None).await.expect_err("no answer");
    assert!(matches!(error, WriteError::Timeout), "{error}");
    assert!(io.metrics.encode().contains(r#"mayfly_kube_writes_total{verb="delete",resource="pods",result="error"} 1"#));
}

#[tokio::test]
async fn an_event_that_cannot_be_published_stops_nothing() {
    let server = Server::new([Answer::Refusal(403, "Forbidden")]);
    let about = ObjectReference { name: Some("ci".to_owned()), namespace: Some("ns".to_owned()), ..ObjectReference::default() };
    door(&server).warn(&about, "RunnerFailed", "DeletePod", &"x".repeat(5000)).await;
    let note = server.calls()[0].body["note"].as_str().map(str::len);
    assert!(note.is_some_and(|length| length <= 1024), "{note:?}");
}
