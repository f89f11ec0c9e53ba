//! What answers in the pod and at the control show together.
//!
//! | control | pod accepted | pod refused | pod silent |
//! |---|---|---|---|
//! | accepted | breach | proved (a policy engine rejects) | proved |
//! | refused | breach | breach (the refusal came from the target) | proved |
//! | silent | breach | shows nothing | shows nothing |

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{Answer, Class, Target};

/// What is known of a class of targets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Verdict {
    /// What answers elsewhere does not answer the pod.
    Proved,
    /// Nothing answered the pod, and nothing would have answered elsewhere: that shows nothing, and never counts as a pass.
    Unproven,
    /// Something answered the pod.
    Breach,
}

impl Verdict {
    /// As it is spelled in statuses and events.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Proved => "Proved",
            Self::Unproven => "Unproven",
            Self::Breach => "Breach",
        }
    }
}

/// The verdict about one class.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// The class.
    pub class: Class,
    /// The verdict.
    pub verdict: Verdict,
    /// What it rests on, for a person.
    pub message: String,
}

/// Judges what the targets answered in the pod, one finding for each class among them. Answers that are missing count as silence that
/// shows nothing.
///
/// Metadata endpoints exist on some clouds and not elsewhere. Where none answers the control, the class stands on [`Class::Outside`]:
/// the same policies close both, and that they are enforced is shown there.
pub fn judge(targets: &[Target], pod: &[Answer]) -> Vec<Finding> {
    let mut classes: BTreeMap<Class, Tally> = BTreeMap::new();
    for (index, target) in targets.iter().enumerate() {
        classes.entry(target.class).or_default().count(target, pod.get(index).copied());
    }
    let outside = classes.get(&Class::Outside).map(Tally::verdict);
    classes
        .iter()
        .map(|(class, tally)| {
            let stands_on_outside = *class == Class::Metadata && tally.verdict() == Verdict::Unproven && outside == Some(Verdict::Proved);
            let (verdict, message) = match stands_on_outside {
                true => (Verdict::Proved, "no metadata endpoint answers here; other addresses outside are closed to the pod".to_owned()),
                false => (tally.verdict(), tally.message()),
            };
            Finding { class: *class, verdict, message }
        })
        .collect()
}

/// The worst verdict; [`Verdict::Unproven`] where nothing was judged.
pub fn overall(findings: &[Finding]) -> Verdict {
    findings.iter().map(|finding| finding.verdict).max().unwrap_or(Verdict::Unproven)
}

#[derive(Default)]
struct Tally {
    tried: usize,
    proved: usize,
    open: Vec<String>,
}

impl Tally {
    fn count(&mut self, target: &Target, pod: Option<Answer>) {
        self.tried += 1;
        match (target.control, pod) {
            (_, Some(Answer::Accepted)) | (Answer::Refused, Some(Answer::Refused)) => self.open.push(target.endpoint.to_string()),
            (Answer::Accepted, Some(_)) | (Answer::Refused, Some(Answer::Silent)) => self.proved += 1,
            (Answer::Silent, Some(_)) | (_, None) => {}
        }
    }

    fn verdict(&self) -> Verdict {
        match (self.open.is_empty(), self.proved) {
            (false, _) => Verdict::Breach,
            (true, 0) => Verdict::Unproven,
            (true, _) => Verdict::Proved,
        }
    }

    fn message(&self) -> String {
        match self.verdict() {
            Verdict::Breach => format!("answers the pod: {}", self.open.join(", ")),
            Verdict::Proved => format!("{} of {} addresses answer the control, none the pod", self.proved, self.tried),
            Verdict::Unproven => format!("none of {} addresses answers the control, so the pod's silence shows nothing", self.tried),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Endpoint;

    fn target(class: Class, control: Answer) -> Target {
        Target { class, endpoint: Endpoint::tcp("192.0.2.1:80".parse().expect("an address")), control }
    }

    fn verdict(control: Answer, pod: Answer) -> Verdict {
        overall(&judge(&[target(Class::Pods, control)], &[pod]))
    }

    #[test]
    fn each_pair_of_answers_has_its_verdict() {
        use Answer::{Accepted, Refused, Silent};
        let table = [
            (Accepted, Accepted, Verdict::Breach),
            (Accepted, Refused, Verdict::Proved),
            (Accepted, Silent, Verdict::Proved),
            (Refused, Accepted, Verdict::Breach),
            (Refused, Refused, Verdict::Breach),
            (Refused, Silent, Verdict::Proved),
            (Silent, Accepted, Verdict::Breach),
            (Silent, Refused, Verdict::Unproven),
            (Silent, Silent, Verdict::Unproven),
        ];
        for (control, pod, expected) in table {
            assert_eq!(verdict(control, pod), expected, "control {control:?}, pod {pod:?}");
        }
    }

    #[test]
    fn nothing_tried_and_an_answer_that_is_missing_prove_nothing() {
        assert_eq!(overall(&judge(&[], &[])), Verdict::Unproven);
        assert_eq!(overall(&judge(&[target(Class::Node, Answer::Accepted)], &[])), Verdict::Unproven);
    }

    #[test]
    fn where_no_metadata_answers_it_stands_on_other_addresses_outside() {
        let nowhere = target(Class::Metadata, Answer::Silent);
        let elsewhere = target(Class::Outside, Answer::Refused);
        let silent = [Answer::Silent, Answer::Silent];
        assert_eq!(overall(&judge(&[nowhere, elsewhere], &silent)), Verdict::Proved);
        assert_eq!(overall(&judge(&[nowhere, target(Class::Outside, Answer::Silent)], &silent)), Verdict::Unproven);
        assert_eq!(overall(&judge(&[nowhere], &silent)), Verdict::Unproven);
        // What answers the pod is a breach, whatever stands beside it.
        assert_eq!(overall(&judge(&[nowhere, elsewhere], &[Answer::Accepted, Answer::Silent])), Verdict::Breach);
    }

    fn answer() -> impl Strategy<Value = Answer> {
        prop_oneof![Just(Answer::Silent), Just(Answer::Refused), Just(Answer::Accepted)]
    }

    fn class() -> impl Strategy<Value = Class> {
        prop_oneof![Just(Class::Metadata), Just(Class::Outside), Just(Class::Node), Just(Class::Pods)]
    }

    proptest! {
        #[test]
        fn an_accepted_try_is_always_a_breach(mut tries in prop::collection::vec((class(), answer(), answer()), 1..20), at in 0_usize..20) {
            let at = at % tries.len();
            tries[at].2 = Answer::Accepted;
            let targets: Vec<Target> = tries.iter().map(|(class, control, _)| target(*class, *control)).collect();
            let pod: Vec<Answer> = tries.iter().map(|(_, _, pod)| *pod).collect();
            prop_assert_eq!(overall(&judge(&targets, &pod)), Verdict::Breach);
        }

        #[test]
        fn without_an_answer_at_the_control_nothing_is_proved(tries in prop::collection::vec((class(), answer()), 0..20)) {
            let targets: Vec<Target> = tries.iter().map(|(class, _)| target(*class, Answer::Silent)).collect();
            let pod: Vec<Answer> = tries.iter().map(|(_, pod)| *pod).collect();
            prop_assert!(judge(&targets, &pod).iter().all(|finding| finding.verdict != Verdict::Proved));
        }
    }
}
