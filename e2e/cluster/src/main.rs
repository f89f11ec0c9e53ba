//! `cluster`: builds, starts, shows and stops the test cluster.

use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{CommandFactory, Parser, Subcommand};
use mayfly_cluster::builder::{self, Selection};
use mayfly_cluster::cluster::Cluster;
use mayfly_cluster::command::command;
use mayfly_cluster::images::Recipe;
use mayfly_cluster::layout::{DEFAULT_NAME, Layout, World};
use mayfly_cluster::local::{Options, Saved};
use mayfly_cluster::process::exit_code;
use mayfly_cluster::progress::{Progress, seconds};
use mayfly_cluster::status::Status;
use mayfly_cluster::{Engine, provider};

/// A real Kubernetes cluster, forge and policy engine on this machine, for Mayfly's tests and demo.
#[derive(Parser)]
#[command(name = "cluster", version, disable_help_subcommand = true)]
struct Cli {
    /// Name of the cluster: up to 10 lower-case letters, digits and dashes.
    #[arg(long, global = true, env = "MAYFLY_E2E_NAME", default_value = DEFAULT_NAME)]
    name: String,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Build what is missing of the cluster's parts and images, or of the named ones.
    Build {
        /// Parts; `cluster build help-parts` lists them.
        parts: Vec<String>,
    },
    /// Bring the cluster up, or make sure that it is.
    Up {
        /// What connects pods.
        #[arg(long, value_enum, default_value_t)]
        engine: Engine,
        /// Start no forge.
        #[arg(long)]
        no_forge: bool,
        /// Build these parts too, beside the cluster's own; `cluster build help-parts` lists them.
        #[arg(long, value_name = "PART", value_delimiter = ',')]
        also: Vec<String>,
    },
    /// Stop everything and remove all but the logs.
    Down {
        /// Remove the logs too.
        #[arg(long)]
        purge: bool,
    },
    /// Show processes and health. Ends with 1 unless all is well.
    Status {
        /// Format.
        #[arg(short, long, value_enum, default_value_t)]
        output: Format,
    },
    /// Show the log of a part, or list the logs.
    Logs {
        /// Part; `audit` is the API server's audit log.
        part: Option<String>,
        /// Go on showing what is written.
        #[arg(short, long)]
        follow: bool,
        /// Show this many lines from the end.
        #[arg(short = 'n', long, default_value_t = 100)]
        lines: usize,
    },
    /// Print shell commands that point kubectl, helm and the tests at the cluster: `eval "$(cluster env)"`.
    Env,
    /// Print where the program of a built part is, such as helm.
    Path {
        /// The part.
        part: String,
    },
    /// Import images into the node.
    Load {
        /// Files that `docker save` or `cluster image` wrote.
        #[arg(required = true)]
        archives: Vec<PathBuf>,
    },
    /// Build an image from a Dockerfile, without a daemon, and import it if the cluster is up. Prints the file.
    Image {
        /// The Dockerfile, or the folder with it.
        path: PathBuf,
        /// Name of the image [default: mayfly.test/FOLDER:dev].
        #[arg(short, long)]
        tag: Option<String>,
        /// Folder with the sources of COPY; may be given several times [default: the Dockerfile's].
        #[arg(long)]
        context: Vec<PathBuf>,
        /// Value of an ARG.
        #[arg(long, value_name = "NAME=VALUE")]
        build_arg: Vec<String>,
        /// Write no image into the node.
        #[arg(long)]
        no_load: bool,
    },
    /// Run a command in a namespace of the cluster.
    Run {
        /// Which.
        world: World,
        /// The command.
        #[arg(last = true, required = true)]
        argv: Vec<String>,
    },
    /// Print completions for a shell.
    Completions {
        /// Shell.
        shell: clap_complete::Shell,
    },
}

#[derive(Clone, Copy, Default, clap::ValueEnum)]
enum Format {
    /// For people.
    #[default]
    Text,
    /// For programs.
    Json,
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(code) => code,
        // Whoever read our output has seen enough.
        Err(error) if error.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == ErrorKind::BrokenPipe) => {
            ExitCode::SUCCESS
        }
        Err(error) => {
            // Nothing is left to tell about it.
            let _ = writeln!(std::io::stderr(), "error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode> {
    let layout = Layout::new(&cli.name)?;
    let progress = Progress::stderr();
    let mut out = std::io::stdout();
    match cli.verb {
        Verb::Build { parts } if parts == ["help-parts"] => {
            for name in builder::all_names() {
                writeln!(out, "{name}")?;
            }
        }
        Verb::Build { parts } => {
            let began = std::time::Instant::now();
            builder::build(&layout, &Selection::named(&parts)?, &progress)?;
            progress.note(format!("everything is built ({})", seconds(began.elapsed())));
        }
        Verb::Up { engine, no_forge, also } => provider::up(&layout, Options { engine, forge: !no_forge }, &also, &progress)?,
        Verb::Down { purge } => provider::down(&layout, purge, &progress)?,
        Verb::Status { output } => return status(&layout, output, &mut out),
        Verb::Logs { part, follow, lines } => return logs(&layout, part.as_deref(), follow, lines, &mut out),
        Verb::Env => environment(&cli.name, &mut out)?,
        Verb::Path { part } => {
            let folder = builder::part_folder(&Layout::new(&cli.name)?, &part)?;
            writeln!(out, "{}", folder.join(&part).display())?;
        }
        Verb::Load { archives } => {
            let cluster = Cluster::connect_to(&cli.name)?;
            for archive in archives {
                let fresh = cluster.load_image(&archive)?;
                progress.note(format!("{}: {}", archive.display(), if fresh { "imported" } else { "is there already" }));
            }
        }
        Verb::Image { path, tag, context, build_arg, no_load } => {
            let mut recipe = Recipe::new(&path, context, tag.as_deref())?;
            for arg in build_arg {
                let (name, value) = arg.split_once('=').with_context(|| format!("--build-arg {arg}: expected NAME=VALUE"))?;
                recipe.args.insert(name.to_owned(), value.to_owned());
            }
            let image = recipe.build(&layout, &progress)?;
            if !no_load && Saved::read(&layout).is_some() && Cluster::connect_to(&cli.name)?.load_image(&image.archive)? {
                progress.note(format!("{}: imported", image.reference));
            }
            writeln!(out, "{}", image.archive.display())?;
        }
        Verb::Run { world, argv } => {
            let status = Cluster::connect_to(&cli.name)?.run_in(world, argv)?;
            return Ok(ExitCode::from(exit_code(status)));
        }
        Verb::Completions { shell } => clap_complete::generate(shell, &mut Cli::command(), "cluster", &mut out),
    }
    Ok(ExitCode::SUCCESS)
}

fn status(layout: &Layout, format: Format, out: &mut impl Write) -> Result<ExitCode> {
    let status = Status::of(layout);
    match format {
        Format::Json => writeln!(out, "{}", serde_json::to_string_pretty(&status)?)?,
        Format::Text => {
            let Some(engine) = &status.engine else {
                writeln!(out, "cluster {} is not up", status.name)?;
                return Ok(ExitCode::FAILURE);
            };
            let health = if status.healthy { "healthy" } else { "NOT healthy" };
            writeln!(out, "cluster {}, engine {engine}: {health}\n", status.name)?;
            writeln!(out, "{:<26} {:>8} {:>8} {:>8}", "PROCESS", "PID", "AGE", "MEMORY")?;
            for process in &status.processes {
                let (pid, age, memory) = match (process.pid, process.seconds, process.memory_mib) {
                    (Some(pid), Some(age), Some(memory)) => (pid.to_string(), format!("{age} s"), format!("{memory} Mi")),
                    _ => ("ended".into(), String::new(), String::new()),
                };
                writeln!(out, "{:<26} {pid:>8} {age:>8} {memory:>8}", process.part)?;
            }
            writeln!(out)?;
            for check in &status.checks {
                writeln!(out, "{:<26} {}", check.name, check.problem.as_deref().unwrap_or("ok"))?;
            }
        }
    }
    Ok(if status.healthy { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn logs(layout: &Layout, part: Option<&str>, follow: bool, lines: usize, out: &mut impl Write) -> Result<ExitCode> {
    let Some(part) = part else {
        for folder in [layout.at("log"), layout.cache().join("log")] {
            for name in log_names(&folder) {
                writeln!(out, "{name}")?;
            }
        }
        return Ok(ExitCode::SUCCESS);
    };
    if part.contains('/') {
        bail!("{part} is not the name of a part");
    }
    let file = [layout.log(part), layout.cache().join(format!("log/{part}.log"))].into_iter().find(|path| path.exists());
    let file = file.with_context(|| format!("there is no log of {part}; `cluster logs` lists what there is"))?;
    let mut tail = command("tail", ["-n", &lines.to_string()]);
    if follow {
        tail.arg("-F");
    }
    let status = tail.arg(file).status().context("cannot start tail")?;
    Ok(ExitCode::from(exit_code(status)))
}

fn log_names(folder: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut names: Vec<String> =
        entries.flatten().filter_map(|entry| entry.file_name().to_str()?.strip_suffix(".log").map(str::to_owned)).collect();
    names.sort();
    names
}

fn environment(name: &str, out: &mut impl Write) -> Result<()> {
    let cluster = Cluster::connect_to(name)?;
    let mut export = |name: &str, value: &str| writeln!(out, "export {name}='{}'", value.replace('\'', r"'\''"));
    export("KUBECONFIG", &cluster.kubeconfig().display().to_string())?;
    export("MAYFLY_E2E_NAME", name)?;
    export("MAYFLY_E2E_CLUSTER", cluster.provider().as_str())?;
    export("MAYFLY_E2E_ENGINE", cluster.engine().as_str())?;
    if let Ok(forge) = cluster.forge() {
        export("MAYFLY_FORGE_URL", &forge.url)?;
        export("MAYFLY_FORGE_LOCAL_URL", &forge.local_url)?;
        export("MAYFLY_FORGE_ADMIN", &forge.admin)?;
        export("MAYFLY_FORGE_ADMIN_PASSWORD_FILE", &cluster.layout().at("forge/admin-password").display().to_string())?;
        export("MAYFLY_FORGE_TOKEN_FILE", &cluster.layout().at("forge/admin-token").display().to_string())?;
    }
    writeln!(out, "export PATH='{}':\"$PATH\"", cluster.layout().at("bin").display())?;
    Ok(())
}
