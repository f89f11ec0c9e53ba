//! Which jobs a pool serves: an ordered chain of small checks, each with a reason.
//!
//! The same chain decides whether a waiting job is owed a runner and whether a job that a runner took may go on.

use mayfly_crds::{Forks, Jobs};
use serde::Serialize;
use wildmatch::WildMatch;

use crate::forge::{Job, Members, Repository, Run, RunnerGroup};

/// What a pool serves, read from its spec.
#[derive(Clone, Debug)]
pub(crate) struct Rules {
    labels: Vec<String>,
    repositories: Vec<WildMatch>,
    workflows: Vec<WildMatch>,
    events: Vec<String>,
    forks: Forks,
    /// Jobs of public repositories are refused, and of those that the forge does not call private.
    private_only: bool,
}

/// Why a job is not served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Refusal {
    /// A word for programs.
    pub(crate) reason: &'static str,
    /// A sentence for a person.
    pub(crate) message: String,
}

type Check = Result<(), Refusal>;

/// The event that nobody gets without naming it.
const PULL_REQUEST_TARGET: &str = "pull_request_target";

impl Rules {
    /// From the spec.
    pub(crate) fn new(labels: &[String], jobs: &Jobs) -> Self {
        let globs = |patterns: &[String]| patterns.iter().map(|pattern| WildMatch::new(pattern)).collect();
        Self {
            labels: labels.to_vec(),
            repositories: globs(&jobs.repositories),
            workflows: globs(&jobs.workflows),
            events: jobs.events.clone(),
            forks: jobs.forks,
            private_only: false,
        }
    }

    /// The same, for private repositories alone where `yes`.
    pub(crate) fn private_only(self, yes: bool) -> Self {
        Self { private_only: yes, ..self }
    }

    /// What the job itself tells: all that can be checked without asking the forge about its run.
    pub(crate) fn check_job(&self, job: &Job) -> Check {
        self.labels_fit(&job.labels)?;
        self.repository_fits(&job.key.repository)
    }

    /// What the run tells.
    pub(crate) fn check_run(&self, run: &Run) -> Check {
        self.workflow_fits(&run.workflow)?;
        self.event_fits(&run.event)?;
        self.fork_fits(run.fork)?;
        match !self.private_only || run.public == Some(false) {
            true => Ok(()),
            false => refuse("PublicRepository", "the repository is public, and runnerGroup.allowPublicRepositories is not set"),
        }
    }

    /// Whether some job may be accepted by both, as far as the rules tell: literal lists without a common member exclude one another.
    pub(crate) fn may_overlap(&self, other: &Self) -> bool {
        let common = |a: &[String], b: &[String]| a.is_empty() || b.is_empty() || a.iter().any(|item| b.contains(item));
        let globs = |a: &[WildMatch], b: &[WildMatch]| {
            let hits = |one: &WildMatch, two: &WildMatch| one.matches(&two.to_string()) || two.matches(&one.to_string());
            let open = |glob: &WildMatch| glob.to_string().contains(['*', '?']);
            a.is_empty() || b.is_empty() || a.iter().any(|one| b.iter().any(|two| hits(one, two) || (open(one) && open(two))))
        };
        self.labels.iter().any(|label| other.labels.contains(label))
            && common(&self.events, &other.events)
            && globs(&self.repositories, &other.repositories)
            && globs(&self.workflows, &other.workflows)
    }

    /// What a runner group lets in that these rules refuse, a phrase each: as far as names of repositories and workflows tell.
    pub(crate) fn refused_of(&self, group: &RunnerGroup) -> Vec<String> {
        let mut wider = Vec::new();
        if !self.repositories.is_empty() {
            let named = |name: &str| self.repositories.iter().any(|glob| glob.matches(name));
            let strangers = match &group.members {
                Members::All(None) => (!named(&format!("{ANY}/{ANY}"))).then(|| "every organization of the enterprise".to_owned()),
                Members::All(Some(owner)) => (!named(&format!("{owner}/{ANY}"))).then(|| format!("every repository of {owner}")),
                Members::Organizations(owners) => some_of(owners.iter().filter(|owner| !named(&format!("{owner}/{ANY}")))),
                Members::Repositories(all) => some_of(all.iter().filter(|repository| !named(repository.as_str()))),
                Members::Unknown => None,
            };
            wider.extend(strangers.map(|strangers| format!("{strangers} (jobs.repositories)")));
        }
        if !self.workflows.is_empty() {
            let named = |workflow: &&String| {
                let path = workflow.split('@').next().unwrap_or_default();
                // A job of the workflow's own repository names the file alone, one that calls it from elsewhere the whole path.
                let file = path.split_once("/.github/workflows/").map_or(path, |(_, file)| file);
                self.workflows.iter().any(|glob| glob.matches(file) || glob.matches(path))
            };
            let strangers = match &group.workflows {
                None => (!self.workflows.iter().any(|glob| glob.matches(ANY))).then(|| "every workflow".to_owned()),
                Some(all) => some_of(all.iter().filter(|workflow| !named(workflow))),
            };
            wider.extend(strangers.map(|strangers| format!("{strangers} (jobs.workflows)")));
        }
        wider
    }

    /// Whether the rules name repositories.
    pub(crate) fn names_repositories(&self) -> bool {
        !self.repositories.is_empty()
    }

    /// Everything.
    pub(crate) fn check(&self, job: &Job, run: &Run) -> Check {
        self.check_job(job)?;
        self.check_run(run)
    }

    fn labels_fit(&self, wanted: &[String]) -> Check {
        if wanted.is_empty() {
            return refuse("NoLabels", "the job names no label in runs-on");
        }
        match wanted.iter().find(|label| !self.labels.contains(label)) {
            Some(label) => refuse("LabelNotServed", format!("this pool's runners do not have the label {label:?}")),
            None => Ok(()),
        }
    }

    fn repository_fits(&self, repository: &Repository) -> Check {
        match self.repositories.is_empty() || self.repositories.iter().any(|glob| glob.matches(repository.as_str())) {
            true => Ok(()),
            false => refuse("RepositoryNotServed", format!("jobs.repositories does not name {repository}")),
        }
    }

    fn workflow_fits(&self, workflow: &str) -> Check {
        match self.workflows.is_empty() || self.workflows.iter().any(|glob| glob.matches(workflow)) {
            true => Ok(()),
            false => refuse("WorkflowNotServed", format!("jobs.workflows does not name {workflow:?}")),
        }
    }

    fn event_fits(&self, event: &str) -> Check {
        let named = self.events.iter().any(|name| name == event);
        match named || (self.events.is_empty() && event != PULL_REQUEST_TARGET) {
            true => Ok(()),
            false => refuse("EventNotServed", format!("jobs.events does not name {event:?}")),
        }
    }

    fn fork_fits(&self, fork: Option<bool>) -> Check {
        match (self.forks, fork) {
            (Forks::Allow, _) | (Forks::Deny, Some(false)) => Ok(()),
            (Forks::Deny, Some(true)) => refuse("ForkDenied", "the job runs a fork's code and jobs.forks is Deny"),
            (Forks::Deny, None) => {
                refuse("ForkDenied", "the forge does not say whether the job runs a fork's code, and jobs.forks is Deny")
            }
        }
    }
}

/// A name that only a pattern fits which fits them all.
const ANY: &str = "\u{1}\u{1}\u{1}\u{1}";

/// The first three of them, and how many more there are. `None` where there are none.
fn some_of(all: impl Iterator<Item = impl ToString>) -> Option<String> {
    let all: Vec<String> = all.map(|item| item.to_string()).collect();
    let first = all.iter().take(3).cloned().collect::<Vec<_>>().join(", ");
    match all.len() {
        0 => None,
        1..=3 => Some(first),
        count => Some(format!("{first} and {} more", count - 3)),
    }
}

fn refuse(reason: &'static str, message: impl Into<String>) -> Check {
    Err(Refusal { reason, message: message.into() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::forge::{JobKey, JobState};

    fn job(repository: &str, labels: &[&str]) -> Job {
        Job {
            key: JobKey { repository: Repository::parse(repository).expect("a repository"), id: 1.into() },
            run: 1,
            state: JobState::Queued,
            labels: labels.iter().map(|l| (*l).to_owned()).collect(),
            runner: None,
            runner_id: None,
        }
    }

    fn run(event: &str, workflow: &str, fork: Option<bool>) -> Run {
        Run { event: event.to_owned(), workflow: workflow.to_owned(), git_ref: "refs/heads/main".to_owned(), fork, public: None }
    }

    fn reason(rules: &Rules, job: &Job, run: &Run) -> &'static str {
        rules.check(job, run).err().map_or("", |refusal| refusal.reason)
    }

    #[test]
    fn each_rule_refuses_with_its_own_reason() {
        let jobs = Jobs {
            repositories: vec!["acme/web*".to_owned()],
            workflows: vec!["ci.yml".to_owned(), "release-?.yml".to_owned()],
            events: vec!["push".to_owned(), "pull_request".to_owned()],
            forks: Forks::Deny,
        };
        let rules = Rules::new(&["linux".to_owned(), "x64".to_owned()], &jobs);
        let web = job("acme/web-1", &["linux"]);
        let push = run("push", "ci.yml", Some(false));
        assert_eq!(reason(&rules, &web, &push), "");
        assert_eq!(reason(&rules, &job("acme/web-1", &["linux", "gpu"]), &push), "LabelNotServed");
        assert_eq!(reason(&rules, &job("acme/web-1", &[]), &push), "NoLabels");
        assert_eq!(reason(&rules, &job("acme/api", &["linux"]), &push), "RepositoryNotServed");
        assert_eq!(reason(&rules, &web, &run("push", "deploy.yml", Some(false))), "WorkflowNotServed");
        assert_eq!(reason(&rules, &web, &run("schedule", "ci.yml", Some(false))), "EventNotServed");
        assert_eq!(reason(&rules, &web, &run("pull_request", "ci.yml", Some(true))), "ForkDenied");
        assert_eq!(reason(&rules, &web, &run("pull_request", "ci.yml", None)), "ForkDenied");
    }

    #[test]
    fn an_empty_rule_serves_everything_but_what_is_dangerous() {
        let rules = Rules::new(&["linux".to_owned()], &Jobs::default());
        let any = job("acme/api", &["linux"]);
        assert_eq!(reason(&rules, &any, &run("schedule", "x.yml", Some(false))), "");
        assert_eq!(reason(&rules, &any, &run(PULL_REQUEST_TARGET, "x.yml", Some(false))), "EventNotServed");
        assert_eq!(reason(&rules, &any, &run("pull_request", "x.yml", Some(true))), "ForkDenied");
    }

    #[test]
    fn pools_overlap_unless_their_rules_exclude_one_another() {
        let rules = |labels: &[&str], repositories: &[&str], events: &[&str]| {
            let list = |items: &[&str]| items.iter().map(|item| (*item).to_owned()).collect::<Vec<_>>();
            let jobs = Jobs { repositories: list(repositories), events: list(events), ..Jobs::default() };
            Rules::new(&list(labels), &jobs)
        };
        let all = rules(&["linux"], &[], &[]);
        assert!(all.may_overlap(&rules(&["linux", "gpu"], &["acme/web"], &["push"])));
        assert!(!all.may_overlap(&rules(&["arm"], &[], &[])));
        let web = rules(&["linux"], &["acme/web*"], &["push"]);
        assert!(web.may_overlap(&rules(&["linux"], &["acme/web-1"], &[])));
        assert!(web.may_overlap(&rules(&["linux"], &["*/api"], &[])), "two patterns may meet");
        assert!(!web.may_overlap(&rules(&["linux"], &["acme/api"], &[])));
        assert!(!web.may_overlap(&rules(&["linux"], &[], &["schedule"])));
    }

    #[test]
    fn a_runner_group_that_lets_in_more_than_the_rules_is_told() {
        let rules = |repositories: &[&str], workflows: &[&str]| {
            let list = |items: &[&str]| items.iter().map(|item| (*item).to_owned()).collect::<Vec<_>>();
            Rules::new(&[], &Jobs { repositories: list(repositories), workflows: list(workflows), ..Jobs::default() })
        };
        let repositories = |names: &[&str]| Members::Repositories(names.iter().filter_map(|name| Repository::parse(name)).collect());
        let acme = || Members::All(Some("acme".to_owned()));
        let release = "acme/web/.github/workflows/release.yml@refs/heads/main";
        type Row<'a> = (Rules, Members, Option<&'a [&'a str]>, &'a [&'a str]);
        let rows: [Row<'_>; 13] = [
            (rules(&[], &[]), acme(), None, &[]),
            (rules(&["acme/*"], &["*"]), acme(), None, &[]),
            (rules(&["acme/web"], &[]), acme(), None, &["every repository of acme (jobs.repositories)"]),
            (rules(&["acme/web*"], &[]), acme(), None, &["every repository of acme (jobs.repositories)"]),
            (rules(&["acme/web*"], &[]), repositories(&["acme/web", "acme/web-2"]), None, &[]),
            (rules(&["acme/web"], &[]), repositories(&["acme/web", "acme/api"]), None, &["acme/api (jobs.repositories)"]),
            (rules(&["x/y"], &[]), repositories(&["a/a", "a/b", "a/c", "a/d"]), None, &["a/a, a/b, a/c and 1 more (jobs.repositories)"]),
            (rules(&["acme/*"], &[]), Members::All(None), None, &["every organization of the enterprise (jobs.repositories)"]),
            (rules(&["acme/*"], &[]), Members::Organizations(vec!["acme".into(), "b".into()]), None, &["b (jobs.repositories)"]),
            (rules(&["acme/web"], &[]), Members::Unknown, None, &[]),
            (rules(&[], &["release.yml"]), acme(), None, &["every workflow (jobs.workflows)"]),
            (rules(&[], &["release.yml"]), acme(), Some(&[release]), &[]),
            (
                rules(&[], &["ci.yml"]),
                acme(),
                Some(&[release]),
                &["acme/web/.github/workflows/release.yml@refs/heads/main (jobs.workflows)"],
            ),
        ];
        for (rules, members, workflows, expected) in rows {
            let workflows = workflows.map(|all| all.iter().map(|item| (*item).to_owned()).collect());
            let group = RunnerGroup { name: "runners".to_owned(), members, workflows };
            assert_eq!(rules.refused_of(&group), expected, "{rules:?} {group:?}");
        }
    }

    #[test]
    fn a_public_repository_is_refused_where_the_forge_does_not_do_it() {
        let rules = |private_only: bool| Rules::new(&["linux".to_owned()], &Jobs::default()).private_only(private_only);
        let reason = |private_only: bool, public: Option<bool>| {
            reason(&rules(private_only), &job("acme/api", &["linux"]), &Run { public, ..run("push", "x.yml", Some(false)) })
        };
        assert_eq!((reason(true, Some(true)), reason(true, None), reason(true, Some(false))), ("PublicRepository", "PublicRepository", ""));
        assert_eq!((reason(false, Some(true)), reason(false, None)), ("", ""));
    }

    #[test]
    fn forks_are_served_where_the_pool_says_so() {
        let rules = Rules::new(&["linux".to_owned()], &Jobs { forks: Forks::Allow, ..Jobs::default() });
        assert_eq!(reason(&rules, &job("acme/api", &["linux"]), &run("pull_request", "x.yml", Some(true))), "");
    }
}
