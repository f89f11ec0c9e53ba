use super::*;

fn parsed(text: &str) -> Vec<Stage> {
    parse(text, &Variables::new()).unwrap()
}

fn refused(text: &str) -> String {
    format!("{:#}", parse(text, &Variables::new()).unwrap_err())
}

fn steps(text: &str) -> Vec<Instruction> {
    parsed(text).pop().unwrap().steps.into_iter().map(|step| step.instruction).collect()
}

#[test]
fn reads_a_product_image() {
    let steps = steps(
        "# syntax=docker/dockerfile:1\nFROM scratch\nARG TARGETARCH\nCOPY --chmod=0755 bin/${TARGETARCH}/mayfly /mayfly\nUSER \
         65532:65532\nENTRYPOINT [\"/mayfly\"]\n",
    );
    let source = format!("bin/{}/mayfly", architecture());
    assert_eq!(
        steps,
        [
            Instruction::Copy { from: None, sources: vec![source], destination: "/mayfly".into(), mode: Some(0o755), owner: None },
            Instruction::User("65532:65532".into()),
            Instruction::Entrypoint(vec!["/mayfly".into()]),
        ]
    );
}

#[test]
fn continued_lines_keep_their_number_and_lose_comments() {
    let stages = parsed("FROM debian:bookworm-slim\n\nRUN apt-get update \\\n # why\n && true\nCMD x\n");
    let steps = &stages[0].steps;
    assert_eq!(stages[0].base, Base::Debian("bookworm".into()));
    assert_eq!((steps[0].line, steps[1].line), (3, 6));
    let Instruction::Run { command, environment } = &steps[0].instruction else { panic!("not RUN") };
    assert_eq!(command[2], "apt-get update && true");
    assert!(environment["PATH"].starts_with("/usr/local/sbin:"));
}

#[test]
fn variables_come_from_arguments_then_defaults() {
    let text = "ARG SUITE=bookworm\nFROM debian:${SUITE}-slim\nARG UID=1001\nENV HOME=/home/$USER_NAME X='$UID' Y=\"a b $UID\"\nUSER \
                ${UID}:${GID:-7}\n";
    let values = steps(text);
    assert_eq!(
        values[0],
        Instruction::Env(vec![("HOME".into(), "/home/".into()), ("X".into(), "$UID".into()), ("Y".into(), "a b 1001".into()),])
    );
    assert_eq!(values[1], Instruction::User("1001:7".into()));
    let given = parse(text, &Variables::from([("SUITE".into(), "trixie".into()), ("UID".into(), "5".into())])).unwrap();
    assert_eq!(given[0].base, Base::Debian("trixie".into()));
    assert_eq!(given[0].steps[1].instruction, Instruction::User("5:7".into()));
}

#[test]
fn a_global_argument_is_unknown_in_a_stage_that_does_not_name_it() {
    let text = "ARG A=1\nFROM scratch\nUSER x$A\n";
    assert_eq!(steps(text), [Instruction::User("x".into())]);
    assert_eq!(steps("ARG A=1\nFROM scratch\nARG A\nUSER x$A\n"), [Instruction::User("x1".into())]);
}

#[test]
fn stages_are_found_by_name_and_number_and_hand_on_their_environment() {
    let stages = parsed("FROM scratch AS Base\nENV A=b\nFROM base\nUSER $A\nCOPY --from=0 /x /y\nCOPY --from=BASE /x /y/\n");
    assert_eq!(stages[1].base, Base::Stage(0));
    assert_eq!(stages[1].steps[0].instruction, Instruction::User("b".into()));
    assert!(matches!(stages[1].steps[2].instruction, Instruction::Copy { from: Some(0), .. }));
}

#[test]
fn what_is_not_understood_names_its_line() {
    for (text, line, why) in [
        ("FROM scratch\nADD http://x /y\n", 2, "not understood"),
        ("FROM scratch\n\nEXPOSE 80", 3, "not understood"),
        ("FROM alpine:3\n", 1, "not known"),
        ("FROM --platform=linux/amd64 scratch\n", 1, "expected `FROM"),
        ("RUN true\n", 1, "before the first FROM"),
        ("FROM scratch\nCOPY a*b /x\n", 2, "patterns"),
        ("FROM scratch\nCOPY ../secret /x\n", 2, "leaves the context"),
        ("FROM scratch\nCOPY a\n", 2, "expected `COPY"),
        ("FROM scratch\nCOPY a b /c\n", 2, "must end with"),
        ("FROM scratch\nCOPY --link a b\n", 2, "--link"),
        ("FROM scratch\nCOPY --from=later a b\n", 2, "no earlier stage"),
        ("FROM scratch\nCOPY --from=0 a b\n", 2, "no earlier stage"),
        ("FROM scratch\nCOPY --chmod=u+x a b\n", 2, "octal"),
        ("FROM scratch\nRUN --mount=type=cache true\n", 2, "options of RUN"),
        ("FROM scratch\nRUN <<EOF\n", 2, "here-documents"),
        ("FROM scratch\nENV A\n", 2, "NAME=VALUE"),
        ("FROM scratch\nENTRYPOINT [\"a\"\n", 2, "JSON"),
        ("FROM scratch\nUSER \"a\n", 2, "not closed"),
        ("FROM scratch\nUSER ${A:+b}\n", 2, "not understood"),
        ("FROM scratch\nWORKDIR here\n", 2, "absolute"),
        ("FROM scratch\nUSER\n", 2, "nothing follows"),
    ] {
        let error = refused(text);
        assert!(error.starts_with(&format!("line {line}: ")) && error.contains(why), "{text:?}: {error}");
    }
    assert!(refused("# escape=`\nFROM scratch\n").contains("line 1"));
    assert_eq!(refused("# nothing\n"), "there is no FROM");
}
