//! A small honest subset of Dockerfiles: what it does not understand is an error that names the line, never a guess.
//!
//! `ARG`, `FROM scratch | debian:SUITE-slim | STAGE [AS NAME]`, `RUN`, `COPY [--from=STAGE] [--chmod=] [--chown=]`, `ENV`, `USER`,
//! `WORKDIR`, `ENTRYPOINT`, `CMD`, `LABEL`. Meanings are those of <https://docs.docker.com/reference/dockerfile/>.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};

/// Variables: `ARG` and `ENV`.
pub type Variables = BTreeMap<String, String>;

/// One `FROM` and what follows.
#[derive(Clone, Debug)]
pub struct Stage {
    /// What it starts from.
    pub base: Base,
    /// Its steps.
    pub steps: Vec<Step>,
    name: Option<String>,
    scope: Scope,
}

/// What a stage starts from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Base {
    /// Nothing.
    Scratch,
    /// A minimal Debian of this suite.
    Debian(String),
    /// An earlier stage.
    Stage(usize),
}

/// One instruction and its line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Number of its first line, from 1.
    pub line: usize,
    /// What it does.
    pub instruction: Instruction,
}

/// What a step does, with variables already put in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Instruction {
    /// Run a command with this environment.
    Run {
        /// Program and arguments.
        command: Vec<String>,
        /// `ARG` and `ENV` up to here.
        environment: Variables,
    },
    /// Copy files.
    Copy {
        /// The stage to take them from, or the context.
        from: Option<usize>,
        /// Paths in it.
        sources: Vec<String>,
        /// Where to; ends with `/` if it is a folder.
        destination: String,
        /// Mode of all copied files, or as they are.
        mode: Option<u32>,
        /// User and group, as numbers or names.
        owner: Option<(String, String)>,
    },
    /// Variables of the container.
    Env(Vec<(String, String)>),
    /// User of the container and of what runs next.
    User(String),
    /// Folder of the container and of what runs next.
    Workdir(String),
    /// Program of the container.
    Entrypoint(Vec<String>),
    /// Its default arguments.
    Cmd(Vec<String>),
    /// Labels of the image.
    Label(Vec<(String, String)>),
}

#[derive(Clone, Debug, Default)]
struct Scope {
    args: Variables,
    env: Variables,
}

impl Scope {
    fn get(&self, name: &str) -> Option<&str> {
        self.env.get(name).or_else(|| self.args.get(name)).map(String::as_str)
    }

    fn all(&self) -> Variables {
        let mut all = self.args.clone();
        all.extend(self.env.clone());
        all
    }
}

/// Reads a Dockerfile; `build_args` are what `--build-arg` would give.
pub fn parse(text: &str, build_args: &Variables) -> Result<Vec<Stage>> {
    let mut parser = Parser { build_args, global: Scope::default(), stages: Vec::new() };
    for (line, instruction) in logical_lines(text)? {
        let (word, rest) = instruction.split_once(char::is_whitespace).unwrap_or((&instruction, ""));
        parser.instruction(line, &word.to_ascii_uppercase(), rest.trim()).with_context(|| format!("line {line}: {word}"))?;
    }
    if parser.stages.is_empty() {
        bail!("there is no FROM");
    }
    Ok(parser.stages)
}

struct Parser<'a> {
    build_args: &'a Variables,
    global: Scope,
    stages: Vec<Stage>,
}

impl Parser<'_> {
    fn instruction(&mut self, line: usize, word: &str, rest: &str) -> Result<()> {
        if rest.is_empty() {
            bail!("nothing follows it");
        }
        if rest.contains("<<") && matches!(word, "RUN" | "COPY") {
            bail!("here-documents are not understood here");
        }
        match word {
            "FROM" => return self.from(rest),
            "ARG" => return self.arg(rest),
            _ => {}
        }
        let count = self.stages.len();
        let names: Vec<Option<String>> = self.stages.iter().map(|stage| stage.name.clone()).collect();
        let Some(stage) = self.stages.last_mut() else { bail!("it stands before the first FROM") };
        let scope = &mut stage.scope;
        let instruction = match word {
            "RUN" => {
                if rest.starts_with("--") {
                    bail!("options of RUN are not understood here");
                }
                Instruction::Run { command: exec_or_shell(rest)?, environment: scope.all() }
            }
            "COPY" => copy(rest, scope, |name| find_stage(name, &names[..count - 1]))?,
            "ENV" => {
                let pairs = pairs(rest, scope)?;
                scope.env.extend(pairs.iter().cloned());
                Instruction::Env(pairs)
            }
            "LABEL" => Instruction::Label(pairs(rest, scope)?),
            "USER" => Instruction::User(one_word(rest, scope)?),
            "WORKDIR" => {
                let folder = one_word(rest, scope)?;
                if !folder.starts_with('/') {
                    bail!("{folder} is not an absolute path");
                }
                Instruction::Workdir(folder)
            }
            "ENTRYPOINT" => Instruction::Entrypoint(exec_or_shell(rest)?),
            "CMD" => Instruction::Cmd(exec_or_shell(rest)?),
            _ => bail!("this instruction is not understood here"),
        };
        stage.steps.push(Step { line, instruction });
        Ok(())
    }

    fn from(&mut self, rest: &str) -> Result<()> {
        let words = words(rest, &self.global)?;
        let (image, name) = match words.as_slice() {
            [image] => (image, None),
            [image, word, name] if word.eq_ignore_ascii_case("as") => (image, Some(name.clone())),
            _ => bail!("expected `FROM IMAGE [AS NAME]`"),
        };
        let names: Vec<Option<String>> = self.stages.iter().map(|stage| stage.name.clone()).collect();
        let mut scope = Scope::default();
        let base = if image == "scratch" {
            Base::Scratch
        } else if let Ok(number) = find_stage(image, &names) {
            scope.env = self.stages[number].scope.env.clone();
            Base::Stage(number)
        } else {
            let suite = image.strip_prefix("debian:").and_then(|tag| tag.strip_suffix("-slim"));
            match suite {
                Some(suite) if suite.bytes().all(|b| b.is_ascii_lowercase()) && !suite.is_empty() => Base::Debian(suite.to_owned()),
                _ => bail!("{image} is not known here; use scratch, debian:SUITE-slim or an earlier stage"),
            }
        };
        if base != Base::Scratch && scope.env.is_empty() {
            scope.env.insert("PATH".into(), "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into());
        }
        self.stages.push(Stage { base, steps: Vec::new(), name, scope });
        Ok(())
    }

    fn arg(&mut self, rest: &str) -> Result<()> {
        for (name, default) in args(rest, self.stages.last().map_or(&self.global, |stage| &stage.scope))? {
            let platform = match name.as_str() {
                "TARGETOS" => Some("linux".to_owned()),
                "TARGETARCH" => Some(architecture().to_owned()),
                _ => None,
            };
            let value = self.build_args.get(&name).cloned().or(default).or_else(|| self.global.args.get(&name).cloned()).or(platform);
            if let Some(value) = value {
                self.stages.last_mut().map_or(&mut self.global, |stage| &mut stage.scope).args.insert(name, value);
            }
        }
        Ok(())
    }
}

/// This machine's architecture, as images name it.
pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// Joins continued lines and drops comments; keeps the number of each instruction's first line.
fn logical_lines(text: &str) -> Result<Vec<(usize, String)>> {
    let mut lines = Vec::new();
    let mut open: Option<(usize, String)> = None;
    for (number, line) in text.lines().enumerate() {
        let trimmed = line.trim();
        if let Some(directive) = trimmed.strip_prefix('#') {
            if lines.is_empty() && open.is_none() && directive.trim_start().to_ascii_lowercase().starts_with("escape=") {
                bail!("line {}: the escape directive is not understood here", number + 1);
            }
            continue;
        }
        if trimmed.is_empty() {
            continue;
        }
        let (content, continued) = match trimmed.strip_suffix('\\') {
            Some(content) => (content.trim_end(), true),
            None => (trimmed, false),
        };
        let (first, mut joined) = open.take().unwrap_or((number + 1, String::new()));
        if !joined.is_empty() {
            joined.push(' ');
        }
        joined.push_str(content);
        if continued {
            open = Some((first, joined));
        } else {
            lines.push((first, joined));
        }
    }
    lines.extend(open);
    Ok(lines)
}

fn find_stage(name: &str, names: &[Option<String>]) -> Result<usize> {
    if let Some(number) = names.iter().position(|known| known.as_deref().is_some_and(|known| known.eq_ignore_ascii_case(name))) {
        return Ok(number);
    }
    match name.parse::<usize>() {
        Ok(number) if number < names.len() => Ok(number),
        _ => bail!("there is no earlier stage {name}"),
    }
}

fn copy(rest: &str, scope: &Scope, stage: impl Fn(&str) -> Result<usize>) -> Result<Instruction> {
    let (mut from, mut mode, mut owner) = (None, None, None);
    let mut rest = rest;
    while let Some(option) = rest.strip_prefix("--") {
        let (option, after) = option.split_once(char::is_whitespace).context("expected `COPY [OPTIONS] SOURCE.. DESTINATION`")?;
        let option = one_word(option, scope)?;
        match option.split_once('=') {
            Some(("from", name)) => from = Some(stage(name)?),
            Some(("chmod", value)) => {
                mode = Some(u32::from_str_radix(value, 8).with_context(|| format!("--chmod={value} is not an octal number"))?);
            }
            Some(("chown", value)) => {
                let (user, group) = value.split_once(':').unwrap_or((value, value));
                owner = Some((user.to_owned(), group.to_owned()));
            }
            _ => bail!("--{option} is not understood here"),
        }
        rest = after.trim_start();
    }
    let mut sources = if rest.starts_with('[') { json(rest)? } else { words(rest, scope)? };
    let Some(destination) = sources.pop().filter(|_| !sources.is_empty()) else {
        bail!("expected `COPY [OPTIONS] SOURCE.. DESTINATION`");
    };
    for source in &sources {
        if source.contains(['*', '?']) {
            bail!("patterns such as {source} are not understood here");
        }
        if source.split('/').any(|part| part == "..") {
            bail!("{source} leaves the context");
        }
    }
    if sources.len() > 1 && !destination.ends_with('/') {
        bail!("with several sources the destination must end with `/`");
    }
    Ok(Instruction::Copy { from, sources, destination, mode, owner })
}

fn exec_or_shell(rest: &str) -> Result<Vec<String>> {
    if rest.starts_with('[') { json(rest) } else { Ok(vec!["/bin/sh".into(), "-c".into(), rest.to_owned()]) }
}

fn json(rest: &str) -> Result<Vec<String>> {
    serde_json::from_str(rest).context("not a JSON list of strings")
}

fn one_word(rest: &str, scope: &Scope) -> Result<String> {
    match words(rest, scope)?.as_slice() {
        [word] => Ok(word.clone()),
        _ => bail!("expected one word"),
    }
}

/// `NAME=VALUE..`. The old form `NAME VALUE` is not understood.
fn pairs(rest: &str, scope: &Scope) -> Result<Vec<(String, String)>> {
    let words = words(rest, scope)?;
    words
        .iter()
        .map(|word| {
            let (name, value) = word.split_once('=').with_context(|| format!("expected NAME=VALUE, found {word}"))?;
            if name.is_empty() {
                bail!("expected NAME=VALUE, found {word}");
            }
            Ok((name.to_owned(), value.to_owned()))
        })
        .collect()
}

/// `NAME[=DEFAULT]..`.
fn args(rest: &str, scope: &Scope) -> Result<Vec<(String, Option<String>)>> {
    Ok(words(rest, scope)?
        .into_iter()
        .map(|word| match word.split_once('=') {
            Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
            None => (word, None),
        })
        .collect())
}

/// Splits at blanks, takes quotes off and puts variables in.
fn words(text: &str, scope: &Scope) -> Result<Vec<String>> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote: Option<char> = None;
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match (c, quote) {
            ('\'', None) | ('"', None) => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (c, Some(q)) if c == q => quote = None,
            ('\\', None | Some('"')) => word.get_or_insert_default().push(chars.next().context("a backslash ends the line")?),
            ('$', None | Some('"')) => {
                let value = variable(&mut chars, scope)?;
                word.get_or_insert_default().push_str(&value);
            }
            (c, None) if c.is_whitespace() => words.extend(word.take()),
            (c, _) => word.get_or_insert_default().push(c),
        }
    }
    if quote.is_some() {
        bail!("a quotation mark is not closed");
    }
    words.extend(word);
    Ok(words)
}

/// `NAME`, `{NAME}` or `{NAME:-DEFAULT}` after a `$`.
fn variable(chars: &mut std::iter::Peekable<std::str::Chars<'_>>, scope: &Scope) -> Result<String> {
    let is_name = |c: &char| c.is_ascii_alphanumeric() || *c == '_';
    if chars.next_if_eq(&'{').is_none() {
        let mut name = String::new();
        while let Some(c) = chars.next_if(is_name) {
            name.push(c);
        }
        if name.is_empty() {
            bail!("a `$` without a name");
        }
        return Ok(scope.get(&name).unwrap_or_default().to_owned());
    }
    let mut inside = String::new();
    loop {
        match chars.next() {
            Some('}') => break,
            Some(c) => inside.push(c),
            None => bail!("`${{` is not closed"),
        }
    }
    let (name, default) = match inside.split_once(":-") {
        Some((name, default)) => (name, Some(default)),
        None => (inside.as_str(), None),
    };
    if name.is_empty() || !name.chars().all(|c| is_name(&c)) {
        bail!("${{{inside}}} is not understood here");
    }
    let value = scope.get(name).filter(|value| !(value.is_empty() && default.is_some()));
    Ok(value.or(default).unwrap_or_default().to_owned())
}

#[cfg(test)]
#[path = "dockerfile_tests.rs"]
mod tests;
