//! Runs short pieces of PTX: 32-bit values in by lane, 32-bit values out by lane.

use tilefold_emulator_ptx::{Fault, Launch, Memory, Module, run};

pub(crate) type Lanes = [u32; 32];

/// Registers that the pieces may use: `%r0`, `%r1`, ... hold the inputs, `%r20`, `%r21`, ... the outputs.
const DECLARATIONS: &str = "
    .reg .pred %p<16>; .reg .b16 %h<16>; .reg .b32 %r<64>; .reg .f32 %f<32>; .reg .b64 %d<32>; .reg .f64 %e<8>;
    .reg .b32 %lane, %thread; .reg .b64 %in, %out, %at;
";

/// A kernel around `body`, with `inputs` words read and `outputs` words written by every thread of a block.
pub(crate) fn kernel(shared: &str, body: &str, inputs: usize, outputs: usize, threads: usize) -> String {
    let mut text = format!(
        ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 in, .param .u64 out)\n{{{DECLARATIONS}{shared}
    ld.param.u64 %in, [in]; ld.param.u64 %out, [out];
    mov.u32 %lane, %laneid; mov.u32 %thread, %tid.x;
    mul.wide.u32 %at, %thread, 4; add.s64 %in, %in, %at; add.s64 %out, %out, %at;\n"
    );
    for i in 0..inputs {
        text += &format!("    ld.global.u32 %r{i}, [%in+{}];\n", 4 * threads * i);
    }
    text += body;
    text += "\n";
    for i in 0..outputs {
        text += &format!("    st.global.u32 [%out+{}], %r{};\n", 4 * threads * i, 20 + i);
    }
    text + "    ret;\n}\n"
}

/// Runs a kernel of [`kernel`]'s form with one block; inputs and outputs are stored one after the other.
pub(crate) fn run_text(text: &str, inputs: &[u32], outputs: usize, threads: usize) -> Result<Vec<u32>, Fault> {
    let module = Module::parse(text).unwrap_or_else(|error| panic!("{error}\n{text}"));
    let memory = Memory::new(1 << 30);
    let bytes: Vec<u8> = inputs.iter().flat_map(|word| word.to_le_bytes()).collect();
    let from = memory.allocate(bytes.len().max(4) as u64).unwrap();
    memory.write(from, &bytes).unwrap();
    let into = memory.allocate((4 * threads * outputs).max(4) as u64).unwrap();
    let mut parameters = from.to_le_bytes().to_vec();
    parameters.extend(into.to_le_bytes());
    let launch = Launch {
        kernel: module.kernel("k").unwrap(),
        module: &module,
        grid: [1, 1, 1],
        block: [threads as u32, 1, 1],
        dynamic_shared_bytes: 0,
        parameters: &parameters,
    };
    run(&memory, &launch)?;
    let mut found = vec![0; 4 * threads * outputs];
    memory.read(into, &mut found).unwrap();
    Ok(found.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word)).collect())
}

/// Runs `body` on one warp.
pub(crate) fn try_warp(shared: &str, body: &str, inputs: &[Lanes], outputs: usize) -> Result<Vec<Lanes>, Fault> {
    let words: Vec<u32> = inputs.iter().flatten().copied().collect();
    let found = run_text(&kernel(shared, body, inputs.len(), outputs, 32), &words, outputs, 32)?;
    Ok(found.as_chunks::<32>().0.to_vec())
}

pub(crate) fn warp(body: &str, inputs: &[Lanes], outputs: usize) -> Vec<Lanes> {
    try_warp("", body, inputs, outputs).unwrap_or_else(|fault| panic!("{body}: {fault}"))
}

/// Runs `body` for each case on a lane of its own, and compares `%r20`, `%r21`, ... with what is due.
pub(crate) fn check<const I: usize, const O: usize>(body: &str, cases: &[([u32; I], [u32; O])]) {
    for cases in cases.chunks(32) {
        let mut inputs = [[0; 32]; I];
        for lane in 0..32 {
            for (input, values) in inputs.iter_mut().enumerate() {
                values[lane] = cases[lane.min(cases.len() - 1)].0[input];
            }
        }
        let found = warp(body, &inputs, O);
        for (lane, (given, due)) in cases.iter().enumerate() {
            let got: [u32; O] = std::array::from_fn(|output| found[output][lane]);
            assert_eq!(got, *due, "{body} of {given:#x?}: got {got:#x?}, due {due:#x?}");
        }
    }
}

pub(crate) fn f(value: f32) -> u32 {
    value.to_bits()
}
