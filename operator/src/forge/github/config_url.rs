//! The address a person gives for an enterprise, organization or repository, and what follows from it.
//!
//! Source: actions/scaleset, config.go; GitHub's REST documentation for the paths.

use std::fmt;

use super::super::Repository;

/// Whose jobs are served.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Level {
    /// An enterprise.
    Enterprise(String),
    /// An organization, or a user.
    Organization(String),
    /// One repository.
    Repository(Repository),
}

/// A parsed address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ConfigUrl {
    /// As runners are told, without a slash at the end.
    pub(crate) text: String,
    /// Host name.
    pub(crate) host: String,
    /// Port.
    pub(crate) port: u16,
    /// Whose jobs.
    pub(crate) level: Level,
    /// Where REST begins, without a slash at the end.
    pub(crate) api: String,
}

impl ConfigUrl {
    /// Reads an address.
    ///
    /// # Errors
    /// What is wrong with it, to follow the field's name.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let form =
            || format!("{text:?} is not https://HOST/ORGANIZATION, https://HOST/OWNER/REPOSITORY or https://HOST/enterprises/ENTERPRISE");
        let url = reqwest::Url::parse(text).map_err(|_| form())?;
        // The parser takes them away, and everybody else would see another address.
        let dots = text.split('/').any(|part| matches!(part, "." | ".."));
        let plain = !dots && url.username().is_empty() && url.password().is_none() && url.query().is_none() && url.fragment().is_none();
        if !matches!(url.scheme(), "http" | "https") || !plain {
            return Err(form());
        }
        let (host, port) = url.host_str().zip(url.port_or_known_default()).ok_or_else(form)?;
        let parts: Vec<&str> = url.path().trim_matches('/').split('/').collect();
        let level = match parts[..] {
            [kind, name] if kind.eq_ignore_ascii_case("enterprises") => is_name(name).then(|| Level::Enterprise(name.to_owned())),
            [owner, name] => Repository::parse(&format!("{owner}/{name}")).map(Level::Repository),
            [name] if !name.eq_ignore_ascii_case("enterprises") => is_name(name).then(|| Level::Organization(name.to_owned())),
            _ => None,
        }
        .ok_or_else(form)?;
        let authority = match url.port() {
            Some(port) => format!("{host}:{port}"),
            None => host.to_owned(),
        };
        let api = match is_hosted(host) {
            true => format!("{}://api.{}", url.scheme(), authority.trim_start_matches("www.")),
            false => format!("{}://{authority}/api/v3", url.scheme()),
        };
        let host = host.trim_matches(['[', ']']).to_owned();
        Ok(Self { text: text.trim_end_matches('/').to_owned(), host, port, level, api })
    }

    /// Whether a job of this repository can come from here.
    pub(crate) fn covers(&self, repository: &Repository) -> bool {
        match &self.level {
            Level::Enterprise(_) => true,
            Level::Organization(name) => repository.owner().eq_ignore_ascii_case(name),
            Level::Repository(own) => own.as_str().eq_ignore_ascii_case(repository.as_str()),
        }
    }

    /// Whether a job can come from both.
    pub(crate) fn meets(&self, other: &Self) -> bool {
        let covers = |one: &Level, two: &Level| match (one, two) {
            (Level::Enterprise(_), _) => true,
            (Level::Organization(one), Level::Organization(two)) => one.eq_ignore_ascii_case(two),
            (Level::Organization(one), Level::Repository(two)) => one.eq_ignore_ascii_case(two.owner()),
            (Level::Repository(one), Level::Repository(two)) => one.as_str().eq_ignore_ascii_case(two.as_str()),
            _ => false,
        };
        self.host == other.host && self.port == other.port && (covers(&self.level, &other.level) || covers(&other.level, &self.level))
    }

    /// The repository, where it is one's.
    pub(crate) fn repository(&self) -> Option<&Repository> {
        match &self.level {
            Level::Repository(name) => Some(name),
            _ => None,
        }
    }

    /// Whether it is one repository's.
    pub(crate) fn is_repository(&self) -> bool {
        matches!(self.level, Level::Repository(_))
    }

    /// Where the other REST calls about runners of this level begin, below [`ConfigUrl::api`].
    pub(crate) fn runners_path(&self) -> String {
        match &self.level {
            Level::Enterprise(name) => format!("/enterprises/{name}/actions"),
            Level::Organization(name) => format!("/orgs/{name}/actions"),
            Level::Repository(name) => format!("/repos/{name}/actions"),
        }
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Enterprise(name) => write!(f, "enterprise {name}"),
            Self::Organization(name) => write!(f, "organization {name}"),
            Self::Repository(name) => write!(f, "repository {name}"),
        }
    }
}

/// github.com and the data-residency hosts of GHE.com. Everything else is a GitHub Enterprise Server.
fn is_hosted(host: &str) -> bool {
    matches!(host, "github.com" | "www.github.com" | "github.localhost") || host.ends_with(".ghe.com")
}

fn is_name(text: &str) -> bool {
    Repository::parse(&format!("{text}/x")).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> (String, String) {
        let url = ConfigUrl::parse(text).expect(text);
        (url.level.to_string(), url.api)
    }

    #[test]
    fn level_and_api_follow_from_the_address() {
        let cases = [
            ("https://github.com/acme", "organization acme", "https://api.github.com"),
            ("https://www.github.com/acme/", "organization acme", "https://api.github.com"),
            ("https://github.com/acme/web.app", "repository acme/web.app", "https://api.github.com"),
            ("https://github.com/enterprises/big", "enterprise big", "https://api.github.com"),
            ("https://acme.ghe.com/Enterprises/big", "enterprise big", "https://api.acme.ghe.com"),
            ("https://git.example.com/acme", "organization acme", "https://git.example.com/api/v3"),
            ("http://git.example.com:8080/acme/web", "repository acme/web", "http://git.example.com:8080/api/v3"),
            ("https://evilghe.com/acme", "organization acme", "https://evilghe.com/api/v3"),
        ];
        for (text, level, api) in cases {
            assert_eq!(read(text), (level.to_owned(), api.to_owned()), "{text}");
        }
    }

    #[test]
    fn what_is_no_such_address_is_refused() {
        for text in [
            "",
            "github.com/acme",
            "https://github.com",
            "https://github.com/",
            "https://github.com/a/b/c",
            "https://github.com/acme?x=1",
            "https://github.com/acme#x",
            "https://user:pw@github.com/acme",
            "ftp://github.com/acme",
            "https://github.com/../acme",
            "https://github.com/ac me",
            "https://github.com/enterprises/",
        ] {
            assert!(ConfigUrl::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn two_addresses_meet_where_one_is_part_of_the_other() {
        let meet = |one: &str, two: &str| {
            let parse = |path: &str| ConfigUrl::parse(&format!("https://github.com/{path}")).expect(path);
            let (one, two) = (parse(one), parse(two));
            assert_eq!(one.meets(&two), two.meets(&one));
            one.meets(&two)
        };
        assert!(meet("acme", "Acme") && meet("acme", "acme/web") && meet("enterprises/big", "acme/web") && meet("acme/web", "acme/Web"));
        assert!(!meet("acme", "eve") && !meet("acme", "eve/web") && !meet("acme/web", "acme/api"));
        let elsewhere = ConfigUrl::parse("https://git.example/acme").expect("an address");
        assert!(!elsewhere.meets(&ConfigUrl::parse("https://github.com/acme").expect("an address")));
    }

    #[test]
    fn only_repositories_of_the_level_are_covered() {
        let covers =
            |url: &str, repository: &str| ConfigUrl::parse(url).expect(url).covers(&Repository::parse(repository).expect("a repository"));
        assert!(covers("https://github.com/acme", "Acme/web") && !covers("https://github.com/acme", "evil/web"));
        assert!(covers("https://github.com/acme/web", "acme/Web") && !covers("https://github.com/acme/web", "acme/api"));
    }
}
