//! The runner group: whether what GitHub lets it be used for is no more than the pool says.
//!
//! Source: docs.github.com, REST, "Self-hosted runner groups" of organizations and of enterprises.

use reqwest::StatusCode;

use super::super::{ForgeError, Members, Repository, RunnerGroup};
use super::config_url::{ConfigUrl, Level};
use super::http::CallError;
use super::service::Service;
use super::{Group, Shared, wire};

/// The number that the default runner group always has, and that a repository's scale sets are in.
pub(super) const DEFAULT_GROUP: u64 = 1;

/// The number of the runner group for the Actions service, if the group is not too open. Notes what the group lets in.
pub(super) async fn group(shared: &Shared) -> Result<u64, CallError> {
    let Some(rules) = look(shared).await? else { return Ok(DEFAULT_GROUP) };
    match rules.default {
        true => Ok(DEFAULT_GROUP),
        false => shared.service.group(&rules.name).await,
    }
}

/// Looks whether somebody opened the group meanwhile. That GitHub cannot be asked just now is no reason to end a session.
pub(super) async fn look_again(shared: &Shared) -> Result<(), CallError> {
    match look(shared).await {
        Err(error @ CallError::Failed(ForgeError::TooOpen(_) | ForgeError::NotFound { .. })) => Err(error),
        Err(error) => {
            tracing::info!(scale_set = shared.config.scale_set, error = %ForgeError::from(error), "the runner group was not looked at again");
            Ok(())
        }
        Ok(_) => Ok(()),
    }
}

async fn look(shared: &Shared) -> Result<Option<wire::GroupRules>, CallError> {
    let found = find(&shared.service, &shared.config.url, &shared.config.group).await?;
    Ok(found.map(|(rules, group)| {
        shared.note_group(group);
        rules
    }))
}

/// The group that a pool wants, if it is not too open, and what it lets in; `None` for a repository's pool, which is in none.
pub(super) async fn find(service: &Service, url: &ConfigUrl, wanted: &Group) -> Result<Option<(wire::GroupRules, RunnerGroup)>, CallError> {
    if let Level::Repository(repository) = &url.level {
        if service.is_public().await? == Some(true) && !wanted.allow_public_repositories {
            return Err(too_open(format!(
                "{repository} is public: anybody may have a pull request's jobs run there. Say runnerGroup.allowPublicRepositories if \
                 that is meant"
            )));
        }
        return Ok(None);
    }
    let groups = service.group_rules().await?;
    let found = match &wanted.name {
        Some(name) => groups.into_iter().find(|group| group.name.eq_ignore_ascii_case(name)),
        None => groups.into_iter().find(|group| group.default),
    };
    let Some(rules) = found else {
        let name = wanted.name.as_deref().unwrap_or("default");
        return Err(ForgeError::NotFound { what: format!("runner group {name:?}") }.into());
    };
    check(wanted, &rules, &url.level).map_err(too_open)?;
    let members = members(service, &url.level, &rules).await?;
    let workflows = rules.restricted_to_workflows.then(|| rules.selected_workflows.clone());
    let group = RunnerGroup { name: rules.name.clone(), members, workflows };
    Ok(Some((rules, group)))
}

fn too_open(why: String) -> CallError {
    CallError::Failed(ForgeError::TooOpen(why))
}

/// Whether the group is as the pool wants it, and what to do where it is not. Pure.
fn check(wanted: &Group, rules: &wire::GroupRules, level: &Level) -> Result<(), String> {
    let name = &rules.name;
    if rules.default && !wanted.allow_default_group {
        return Err(
            "the default runner group can be used by every repository there is and will be: name another in runnerGroup.name, or say \
             runnerGroup.allowDefaultGroup"
                .to_owned(),
        );
    }
    if rules.allows_public_repositories && !wanted.allow_public_repositories {
        return Err(format!(
            "runner group {name:?} can be used by public repositories: take that away at GitHub, or say runnerGroup.allowPublicRepositories"
        ));
    }
    if wanted.require_selected_repositories && rules.visibility != SELECTED {
        let (who, access) = match level {
            Level::Enterprise(_) => ("organization", "organization access"),
            _ => ("repository", "repository access"),
        };
        return Err(format!(
            "runner group {name:?} is not restricted to selected ones: every {who} may use it, and runnerGroup.requireSelectedRepositories \
             asks for a group that is. Select them at GitHub, in the group's {access}"
        ));
    }
    if wanted.require_selected_workflows && !rules.restricted_to_workflows {
        return Err(format!(
            "runner group {name:?} is not restricted to selected workflows: jobs of every workflow may use it, and \
             runnerGroup.requireSelectedWorkflows asks for a group that is. Select them at GitHub, in the group's workflow access"
        ));
    }
    Ok(())
}

/// [`wire::GroupRules::visibility`] of a group that not everybody of the level may use.
const SELECTED: &str = "selected";

/// Who may use the group. That GitHub does not say is no reason to do without the pool.
async fn members(service: &Service, level: &Level, rules: &wire::GroupRules) -> Result<Members, CallError> {
    let read = match (level, rules.visibility == SELECTED) {
        (Level::Organization(name), false) => return Ok(Members::All(Some(name.clone()))),
        (_, false) => return Ok(Members::All(None)),
        (Level::Enterprise(_), true) => service.group_organizations(rules.id).await.map(Members::Organizations),
        (_, true) => service.group_repositories(rules.id).await.map(|names| {
            // A name that cannot be one is nobody's.
            Members::Repositories(names.iter().filter_map(|name| Repository::parse(name)).collect())
        }),
    };
    match read {
        Err(error) if error.is(StatusCode::NOT_FOUND) || error.is(StatusCode::FORBIDDEN) => Ok(Members::Unknown),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_has_to_be_as_the_pool_says() {
        let organization = Level::Organization("acme".to_owned());
        let group = |visibility: &str, restricted: bool| wire::GroupRules {
            name: "runners".to_owned(),
            visibility: visibility.to_owned(),
            restricted_to_workflows: restricted,
            ..wire::GroupRules::default()
        };
        let both = Group { require_selected_repositories: true, require_selected_workflows: true, ..Group::default() };
        let repositories = Group { require_selected_repositories: true, ..Group::default() };
        let workflows = Group { require_selected_workflows: true, ..Group::default() };
        let rows = [
            (Group::default(), group("all", false), ""),
            (repositories.clone(), group("all", false), "repository access"),
            (repositories.clone(), group("private", false), "requireSelectedRepositories"),
            (repositories, group(SELECTED, false), ""),
            (workflows.clone(), group(SELECTED, false), "workflow access"),
            (workflows, group("all", true), ""),
            (both.clone(), group(SELECTED, true), ""),
            // What an older server does not say is no restriction.
            (both.clone(), group("", false), "requireSelectedRepositories"),
            (both.clone(), wire::GroupRules { default: true, ..group(SELECTED, true) }, "allowDefaultGroup"),
            (both.clone(), wire::GroupRules { allows_public_repositories: true, ..group(SELECTED, true) }, "allowPublicRepositories"),
        ];
        for (wanted, rules, says) in rows {
            match check(&wanted, &rules, &organization) {
                Ok(()) => assert!(says.is_empty(), "{wanted:?} {rules:?}"),
                Err(why) => assert!(!says.is_empty() && why.contains(says), "{wanted:?} {rules:?}: {why}"),
            }
        }
        let why = check(&both, &group("all", true), &Level::Enterprise("big".to_owned())).expect_err("not selected");
        assert!(why.contains("organization access"), "{why}");
    }
}
