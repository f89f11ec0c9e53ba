//! How many more runner pods there is room for: what ResourceQuotas leave, and what a forge is told of it. Pure.
//!
//! Source: kubernetes.io, "Resource Quotas"; kubernetes, pkg/quota/v1/evaluator/core/pods.go, for what a pod is charged with.

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Pod, PodSpec, ResourceQuota, ResourceQuotaSpec, ScopedResourceSelectorRequirement};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::ResourceExt;

use super::plan::{PodFacts, Role};
use crate::runner::Phase;

/// A pod that no node takes is told to the forge after this long: until then a node may come, or make room.
const NO_NODE: SignedDuration = SignedDuration::from_secs(30);
/// How many parts of a unit are counted.
const PARTS: i128 = 1_000_000_000;

/// What pods are charged with, by the name that a quota has for it, in billionths of its unit.
pub(crate) type Charge = BTreeMap<String, i128>;

/// What the quotas of a namespace leave to a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Left {
    /// Pods that can still be made.
    pub(crate) pods: u32,
    /// Which quota keeps it from being more, and what a pod needs of it.
    pub(crate) by: String,
    /// Pods that there could be if nobody else used the quotas.
    pub(crate) most: u32,
    /// Which quota keeps that from being more.
    pub(crate) most_by: String,
}

/// What one pod like this is charged with. A RuntimeClass's overhead is added by the API server, and not known here.
pub(crate) fn charge(pod: &Pod) -> Charge {
    let mut charge = Charge::from([("pods".to_owned(), PARTS), ("count/pods".to_owned(), PARTS)]);
    let Some(PodSpec { containers, init_containers, .. }) = &pod.spec else { return charge };
    // The gate is a sidecar: it runs beside the runner, so that both count.
    for container in containers.iter().chain(init_containers.iter().flatten()) {
        let Some(resources) = &container.resources else { continue };
        let (limits, requests) = (resources.limits.clone().unwrap_or_default(), resources.requests.clone().unwrap_or_default());
        for (name, amount) in &limits {
            add(&mut charge, format!("limits.{name}"), amount);
            // What is limited and not asked for is asked for up to the limit.
            if !requests.contains_key(name) {
                add(&mut charge, format!("requests.{name}"), amount);
                add(&mut charge, name.clone(), amount);
            }
        }
        for (name, amount) in &requests {
            add(&mut charge, format!("requests.{name}"), amount);
            add(&mut charge, name.clone(), amount);
        }
    }
    charge
}

fn add(charge: &mut Charge, name: String, amount: &Quantity) {
    *charge.entry(name).or_default() += parts(amount).unwrap_or_default();
}

/// `charge`, so many times over, added to `all`.
pub(crate) fn add_times(all: &mut Charge, charge: &Charge, times: usize) {
    for (name, amount) in charge {
        *all.entry(name.clone()).or_default() += amount.saturating_mul(i128::try_from(times).unwrap_or(i128::MAX));
    }
}

/// What these quotas leave for pods that are charged with `charge` each. `coming` was made and may not be counted yet. `None` where no quota
/// counts such pods.
pub(crate) fn left(quotas: &[Arc<ResourceQuota>], charge: &Charge, coming: &Charge) -> Option<Left> {
    let mut left: Option<Left> = None;
    for quota in quotas.iter().filter(|quota| counts(quota.spec.as_ref())) {
        let name = quota.name_any();
        let wanted = quota.spec.as_ref().and_then(|spec| spec.hard.clone()).unwrap_or_default();
        let status = quota.status.as_ref();
        let hard = status.and_then(|status| status.hard.clone()).unwrap_or_default();
        let used = status.and_then(|status| status.used.clone()).unwrap_or_default();
        for (resource, text) in &wanted {
            let Some(each) = charge.get(resource).copied().filter(|each| *each > 0) else { continue };
            let by = format!("ResourceQuota {name}: {resource} is {}, and a runner pod needs {}", text.0, tell(resource, each));
            let fits = |amount: i128| u32::try_from(amount.max(0) / each).unwrap_or(u32::MAX);
            // The API server admits nothing before it has counted what there is.
            let free = match (hard.get(resource).and_then(parts), used.get(resource).and_then(parts)) {
                (Some(hard), Some(used)) => hard.saturating_sub(used).saturating_sub(coming.get(resource).copied().unwrap_or_default()),
                _ => 0,
            };
            let (pods, most) = (fits(free), parts(text).map_or(0, fits));
            let so_far = left.get_or_insert_with(|| Left { pods, by: by.clone(), most, most_by: by.clone() });
            if pods < so_far.pods {
                (so_far.pods, so_far.by) = (pods, by.clone());
            }
            if most < so_far.most {
                (so_far.most, so_far.most_by) = (most, by);
            }
        }
    }
    left
}

/// Whether a quota counts runner pods, which have a deadline, requests and no priority class.
fn counts(spec: Option<&ResourceQuotaSpec>) -> bool {
    let Some(spec) = spec else { return false };
    let scopes = spec.scopes.iter().flatten().all(|scope| matches!(scope.as_str(), "Terminating" | "NotBestEffort"));
    let selected = spec.scope_selector.iter().flat_map(|selector| selector.match_expressions.iter().flatten()).all(selects);
    scopes && selected
}

fn selects(requirement: &ScopedResourceSelectorRequirement) -> bool {
    match (requirement.scope_name.as_str(), requirement.operator.as_str()) {
        ("Terminating" | "NotBestEffort", "Exists") | ("PriorityClass", "NotIn" | "DoesNotExist") => true,
        (_, _) => false,
    }
}

/// A quantity, in billionths of its unit; parts of these are rounded up. `None` for what is none.
///
/// Source: kubernetes, apimachinery, pkg/api/resource/quantity.go.
pub(crate) fn parts(quantity: &Quantity) -> Option<i128> {
    let text = quantity.0.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && !matches!(c, '.' | '+' | '-')).unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let (ten, two): (i32, u32) = match suffix {
        "n" => (-9, 0),
        "u" => (-6, 0),
        "m" => (-3, 0),
        "" => (0, 0),
        "k" => (3, 0),
        "M" => (6, 0),
        "G" => (9, 0),
        "T" => (12, 0),
        "P" => (15, 0),
        "E" => (18, 0),
        "Ki" => (0, 10),
        "Mi" => (0, 20),
        "Gi" => (0, 30),
        "Ti" => (0, 40),
        "Pi" => (0, 50),
        "Ei" => (0, 60),
        other => (other.strip_prefix(['e', 'E'])?.parse().ok().filter(|power: &i32| power.abs() <= 18)?, 0),
    };
    let (negative, digits) = match number.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, number.strip_prefix('+').unwrap_or(number)),
    };
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let all = format!("{whole}{fraction}");
    // More than any cluster has of anything.
    if all.is_empty() || all.len() > 18 || !all.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let power = ten + 9 - i32::try_from(fraction.len()).ok()?;
    let scaled = all.parse::<i128>().ok()?.checked_mul(1 << two)?;
    let size = match u32::try_from(power) {
        Ok(power) => scaled.checked_mul(10_i128.checked_pow(power)?)?,
        Err(_) => {
            let by = 10_i128.checked_pow(power.unsigned_abs())?;
            (scaled + by - 1) / by
        }
    };
    Some(if negative { -size } else { size })
}

/// An amount for people.
fn tell(resource: &str, amount: i128) -> String {
    const MEBI: i128 = 1 << 20;
    let whole = amount / PARTS;
    match amount % PARTS == 0 {
        true if resource.ends_with("cpu") => whole.to_string(),
        true if whole >= MEBI && whole % MEBI == 0 => format!("{}Mi", whole / MEBI),
        true => whole.to_string(),
        false => format!("{}m", (amount + 999_999) / 1_000_000),
    }
}

/// What the room is reckoned from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Facts<'a> {
    /// The time.
    pub(crate) now: Timestamp,
    /// `scale.max`.
    pub(crate) max: u32,
    /// Starts that failed in a row.
    pub(crate) start_failures: u32,
    /// Accepted jobs that wait.
    pub(crate) queued: usize,
    /// Jobs that wait and that the pool refuses.
    pub(crate) refused: usize,
    /// The pool's pods.
    pub(crate) pods: &'a [PodFacts],
    /// What quotas leave.
    pub(crate) quota: Option<&'a Left>,
}

/// How many jobs the pool can have at the same time, for a forge that gives out no more: no more than quotas leave, and no more than it has
/// while its pods find no node or do not start. Jobs that it refuses count at the forge as well, and would keep others from coming.
pub(crate) fn jobs_at_once(facts: &Facts<'_>) -> u32 {
    let number = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    let own = number(facts.pods.len());
    let homeless = |pod: &PodFacts| {
        let waits = matches!((&pod.role, &pod.phase), (Role::Waiting { ready: false }, Phase::Alive { waits: Some(_) }));
        waits && pod.only_on.is_none() && facts.now.duration_since(pod.created) > NO_NODE
    };
    let mut served = facts.max;
    if facts.start_failures > 0 {
        served = served.min(own.saturating_add(number(facts.queued)).max(1));
    }
    if facts.pods.iter().any(homeless) {
        served = served.min(own.max(1));
    }
    if let Some(left) = facts.quota {
        served = served.min(own.saturating_add(left.pods));
    }
    served.saturating_add(number(facts.refused))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::runner::Reason;

    fn quota(name: &str, spec: Value, used: Value) -> Arc<ResourceQuota> {
        let status = if used.is_null() { Value::Null } else { json!({"hard": spec["hard"], "used": used}) };
        Arc::new(serde_json::from_value(json!({"metadata": {"name": name}, "spec": spec, "status": status})).expect("a quota"))
    }

    fn runner() -> Charge {
        let pod = json!({"metadata": {"name": "r"}, "spec": {
            "initContainers": [{"name": "gate", "restartPolicy": "Always", "resources": {
                "requests": {"cpu": "5m", "memory": "16Mi"}, "limits": {"cpu": "500m", "memory": "64Mi"}}}],
            "containers": [{"name": "runner", "resources": {
                "requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"cpu": "2", "memory": "4Gi", "example.com/gpu": "1"}}}],
        }});
        charge(&serde_json::from_value(pod).expect("a pod"))
    }

    #[test]
    fn quantities_are_read_as_kubernetes_reads_them() {
        let read = |text: &str| parts(&Quantity(text.to_owned()));
        let rows = [
            ("1", Some(PARTS)),
            ("100m", Some(PARTS / 10)),
            ("0.5", Some(PARTS / 2)),
            (".5", Some(PARTS / 2)),
            ("1.5Gi", Some(3 * (1 << 29) * PARTS)),
            ("2k", Some(2_000 * PARTS)),
            ("1e3", Some(1_000 * PARTS)),
            ("12E-1", Some(PARTS + PARTS / 5)),
            ("1E", Some(1_000_000_000_000_000_000 * PARTS)),
            ("0.0000000001", Some(1)),
            ("-1", Some(-PARTS)),
            ("+3", Some(3 * PARTS)),
            ("", None),
            (".", None),
            ("m", None),
            ("1 Gi", None),
            ("1gi", None),
            ("1e99", None),
            ("--1", None),
            ("9999999999999999999", None),
        ];
        for (text, expected) in rows {
            assert_eq!(read(text), expected, "{text:?}");
        }
    }

    #[test]
    fn a_pod_is_charged_with_all_of_its_containers() {
        let charge = runner();
        let tells: Vec<String> = charge.iter().map(|(name, amount)| format!("{name}={}", tell(name, *amount))).collect();
        assert_eq!(
            tells.join(" "),
            "count/pods=1 cpu=105m example.com/gpu=1 limits.cpu=2500m limits.example.com/gpu=1 limits.memory=4160Mi memory=144Mi pods=1 \
             requests.cpu=105m requests.example.com/gpu=1 requests.memory=144Mi"
        );
    }

    #[test]
    fn the_tightest_quota_says_how_many_pods_there_can_be() {
        let none = Charge::new;
        let coming = |times: usize| {
            let mut coming = Charge::new();
            add_times(&mut coming, &runner(), times);
            coming
        };
        let pods = |hard: &str, used: &str| quota("few", json!({"hard": {"pods": hard}}), json!({"pods": used}));
        let memory = |used: &str| quota("compute", json!({"hard": {"limits.memory": "10Gi"}}), json!({"limits.memory": used}));
        let scoped = |scopes: Value| quota("scoped", json!({"hard": {"pods": "1"}, "scopes": scopes}), json!({"pods": "0"}));
        let selected = |scope: &str, operator: &str| {
            let selector = json!({"matchExpressions": [{"scopeName": scope, "operator": operator, "values": ["high"]}]});
            quota("selected", json!({"hard": {"pods": "1"}, "scopeSelector": selector}), json!({"pods": "0"}))
        };
        type Row = (&'static str, Vec<Arc<ResourceQuota>>, Charge, Option<(u32, u32)>);
        let rows: [Row; 16] = [
            ("no quota", vec![], none(), None),
            ("of something else", vec![quota("x", json!({"hard": {"services": "1"}}), json!({"services": "1"}))], none(), None),
            ("pods", vec![pods("5", "2")], none(), Some((3, 5))),
            ("used up", vec![pods("5", "5")], none(), Some((0, 5))),
            ("more used than there is", vec![pods("5", "7")], none(), Some((0, 5))),
            ("some are coming", vec![pods("5", "2")], coming(2), Some((1, 5))),
            ("more are coming than fit", vec![pods("5", "2")], coming(9), Some((0, 5))),
            ("memory", vec![memory("1Gi")], none(), Some((2, 2))),
            ("the tighter of two", vec![pods("5", "4"), memory("0")], none(), Some((1, 2))),
            ("not counted yet", vec![quota("new", json!({"hard": {"pods": "5"}}), Value::Null)], none(), Some((0, 5))),
            ("pods with a deadline", vec![scoped(json!(["Terminating", "NotBestEffort"]))], none(), Some((1, 1))),
            ("pods without one", vec![scoped(json!(["NotTerminating"]))], none(), None),
            ("pods without requests", vec![scoped(json!(["BestEffort"]))], none(), None),
            ("a priority class", vec![selected("PriorityClass", "In")], none(), None),
            ("all but a priority class", vec![selected("PriorityClass", "NotIn")], none(), Some((1, 1))),
            ("a scope to come", vec![selected("Tomorrow", "Exists")], none(), None),
        ];
        for (what, quotas, coming, expected) in rows {
            let found = left(&quotas, &runner(), &coming);
            assert_eq!(found.as_ref().map(|left| (left.pods, left.most)), expected, "{what}: {found:?}");
        }
        let told = left(&[pods("5", "4"), memory("0")], &runner(), &none()).expect("two quotas");
        assert_eq!(told.by, "ResourceQuota few: pods is 5, and a runner pod needs 1");
        assert_eq!(told.most_by, "ResourceQuota compute: limits.memory is 10Gi, and a runner pod needs 4160Mi");
    }

    #[test]
    fn a_forge_is_told_of_no_more_room_than_there_is() {
        let now = Timestamp::from_second(1_000_000).expect("a time");
        let pod = |role: Role, waits: bool, age: i64| PodFacts {
            name: "p".to_owned(),
            uid: "u".to_owned(),
            created: now - SignedDuration::from_secs(age),
            phase: Phase::Alive { waits: waits.then(|| Reason::new("Unschedulable", "no node")) },
            role,
            unproved: None,
            node: None,
            only_on: None,
        };
        let waiting = |unschedulable: bool, age: i64| pod(Role::Waiting { ready: false }, unschedulable, age);
        let done = || pod(Role::Done, false, 60);
        let quota = |pods: u32| Left { pods, by: String::new(), most: 9, most_by: String::new() };
        // Starts that failed, jobs that wait, jobs refused, pods, what a quota leaves; how many jobs.
        let rows = [
            (0, 0, 0, vec![], None, 10),
            (0, 3, 2, vec![], None, 12),
            (1, 0, 0, vec![], None, 1),
            (1, 2, 1, vec![done()], None, 4),
            (0, 5, 0, vec![done(), waiting(true, 10)], None, 10),
            (0, 5, 0, vec![done(), waiting(true, 31)], None, 2),
            (0, 5, 0, vec![done(), waiting(false, 31)], None, 10),
            (0, 0, 0, vec![PodFacts { only_on: Some("node1".to_owned()), ..waiting(true, 31) }], None, 10),
            (0, 0, 0, vec![], Some(quota(3)), 3),
            (0, 0, 0, vec![done(), done()], Some(quota(3)), 5),
            (0, 0, 0, vec![done(), done()], Some(quota(30)), 10),
            (0, 0, 2, vec![], Some(quota(0)), 2),
        ];
        for (at, (start_failures, queued, refused, pods, quota, expected)) in rows.into_iter().enumerate() {
            let facts = Facts { now, max: 10, start_failures, queued, refused, pods: &pods, quota: quota.as_ref() };
            assert_eq!(jobs_at_once(&facts), expected, "row {at}");
        }
    }
}
