//! What is not understood is refused by name, with its line.

use tilefold_emulator_ptx::{Module, ParseError};

use crate::harness::kernel;

fn refused(body: &str) -> ParseError {
    Module::parse(&kernel("", body, 0, 0, 32)).expect_err(body)
}

#[test]
fn unknown_instructions() {
    for (body, name) in [
        ("wgmma.fence.sync.aligned;", "wgmma.fence.sync.aligned"),
        ("dp4a.u32.u32 %r20, %r0, %r1, %r2;", "dp4a.u32.u32"),
        ("tex.2d.v4.f32.f32 %f0, %f1, %f2, %f3;", "tex.2d.v4.f32.f32"),
        ("isspacep.global %p1, %d0;", "isspacep.global"),
    ] {
        let found = refused(body);
        assert!(matches!(&found, ParseError::UnknownInstruction { opcode, .. } if opcode == name), "{found}");
        let text = kernel("", body, 0, 0, 32);
        let line = text.lines().position(|line| line.contains(name)).unwrap() + 1;
        assert_eq!(found.to_string(), format!("PTX line {line}: unknown instruction `{name}`"));
    }
}

#[test]
fn unknown_modifiers_and_types() {
    for (body, name) in [
        ("add.cc.u32 %r20, %r0, %r1;", ".cc"),
        ("add.s8 %r20, %r0, %r1;", ".s8"),
        ("add.wide.s32 %r20, %r0, %r1;", ".wide"),
        ("ld.global.evil.u32 %r20, [%in];", ".evil"),
        ("atom.global.add.f32 %f0, [%out], %f1;", ".f32"),
        ("mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%f0}, {%r0}, {%r1}, {%f0};", ".m8n8k4"),
        (
            "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%r0, %r1}, {%r0, %r1, %r2, %r3}, {%r0, %r1}, {%r0, %r1};",
            ".f16.f16.f16.f16",
        ),
        ("cvt.rn.satfinite.e4m3x2.f32 %h0, %f0, %f1;", ".satfinite"),
        ("min.xorsign.abs.f32 %f0, %f1, %f2;", ".xorsign"),
        ("min.NaN.f64 %e0, %e1, %e2;", ".NaN"),
        ("shfl.sync.spin.b32 %r20, %r0, 1, 31, -1;", ".spin"),
        ("cp.async.bulk.commit_group;", ".commit_group"),
    ] {
        let found = refused(body);
        let named = matches!(&found, ParseError::UnknownModifier { modifier, .. } if modifier == name || name == ".commit_group");
        assert!(named, "{body}: {found}");
    }
}

#[test]
fn operands_that_do_not_fit() {
    for body in [
        "add.u32 %r20, %r0;",
        "add.u32 %r20, %d0, %r1;",
        "add.f32 %f0, %f1, %d0;",
        "add.u32 %r20, %r0, 0x100000000;",
        "bra NOWHERE;",
        "mov.u32 %r20, nothing;",
        "mov.u32 %r20, %smid;",
        "st.param.u32 [in], %r20;",
        "ld.global.v4.u64 {%d0, %d1, %d2, %d3}, [%in];",
        "ld.global.u64 %r20, [%in];",
        "ld.global.v2.u32 {%r20}, [%in];",
        "cp.async.cg.shared.global [%r0], [%in], 8;",
        "cvt.s32.f32 %r20, %f0;",
        "cvt.f32.s32 %f0, %r0;",
        "cvt.f16.f32 %h0, %f0;",
        // Hardware of sm_80 has none of these.
        "add.bf16 %h0, %h1, %h2;",
        "cvt.f32.bf16 %f0, %h0;",
        "mov.b64 %d0, {%r0, %r1, %r2};",
        "setp.lt.u32 %p1, %r0, %r1, %p2;",
        "lop3.b32 %r20, %r0, %r1, %r2, 256;",
        "selp.u32 %r20, 1, 2, %r3;",
    ] {
        let found = refused(body);
        assert!(matches!(found, ParseError::Operands { .. }), "{body}: {found}");
    }
    let syntax = refused("@%r0 bra X; X:");
    assert!(matches!(syntax, ParseError::Syntax { .. }), "{syntax}");
    let syntax = refused("mov.u32 %r20 5;");
    assert_eq!(syntax.to_string().rsplit_once(": ").unwrap().1, "cannot read `5` where `,` is due");
    let undeclared = refused("ld.global.u32 %r20, [%x0];");
    assert!(undeclared.to_string().contains("undeclared register `%x0`"), "{undeclared}");
}

#[test]
fn functions_and_directives() {
    let head = ".version 8.0\n.target sm_80\n.address_size 64\n";
    for (text, what) in [
        (".extern .func (.param .b32 r) vprintf (.param .b64 a, .param .b64 b);", "device function `vprintf`"),
        (".func helper(.param .b32 a) { ret; }", "device function `helper`"),
        (".alias a, b;", "directive `.alias`"),
        (".extern .global .u32 x;", "external variable `x`"),
        (".global .u64 p = x;", "address of `x` as an initial value"),
        (".global .texref t;", "type or attribute `.texref`"),
        (".entry k() .maxclusterrank 2 { ret; }", "directive `.maxclusterrank`"),
        (".entry k() { .local .align 8 .b8 l[1000000]; ret; }", "1000008 bytes of local memory"),
        (".entry k() { .shared .align 8 .b8 s[50000]; ret; }", "50000 bytes of static shared memory"),
        (".const .b8 c[65537];", "a constant bank of 65538 bytes"),
    ] {
        let found = Module::parse(&format!("{head}{text}\n")).expect_err(text);
        assert!(matches!(&found, ParseError::Unsupported { what: found, .. } if found == what), "{found}");
    }
    let found = Module::parse(".version 8.0\n.target gfx90a\n").unwrap_err();
    assert_eq!(found.to_string(), "PTX line 2: target `gfx90a` is not supported");
}

#[test]
fn broken_texts_are_errors_and_no_panics() {
    let text = kernel(
        ".shared .align 16 .b8 s[64];",
        "L: shfl.sync.idx.b32 %r20|%p1, %r20, 0x1f, 31, -1; @!%p1 bra L; { .reg .b32 t; mov.b32 {%h0, %h1}, t; }",
        1,
        1,
        32,
    );
    Module::parse(&text).unwrap();
    // Cut anywhere, or with any byte replaced, the text is read or refused.
    for at in 0..text.len() {
        let _ = Module::parse(&text[..at]);
        for with in ["", "{", "}", ";", ".", "9", "%", "\"", "<"] {
            let _ = Module::parse(&format!("{}{with}{}", &text[..at], &text[at + 1..]));
        }
    }
}
